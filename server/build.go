package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"nbd/nixproto"
	"nbd/reuse"
	"nbd/server/settings"
	"nbd/store"
	"nbd/vm"
	"nbd/vm/usernet"
)

// BuildsConfig says what Builds works with. Store and Runner are required; the
// zero value of every other field works.
type BuildsConfig struct {
	Store  *store.Store
	Runner runner
	// Room is what all guests together may take. Zero fields mean: as many
	// guests as the other two allow, three quarters of the machine's memory (or of
	// what its cgroups leave the server), and twice its CPUs.
	Room Room
	// Machine is looked at before guests are started, which wait where it has too
	// little left; nil if only Room counts.
	Machine *Machine
	// CPUs of a guest; default 2.
	CPUs int
	// MemoryMiB is what a build is given at first; default 2048. One that runs
	// out of it is tried again with twice as much, up to MaxMemoryMiB; default
	// as much as Room allows.
	MemoryMiB, MaxMemoryMiB int
	// ScratchMiB is the writable disk of a guest at first, rounded up to a power
	// of two GiB; default 50 GiB. One that fills it is tried again with twice as
	// much, up to MaxScratchMiB; default four times as much.
	ScratchMiB, MaxScratchMiB int
	// MachineCPUs is how many CPUs a guest is given at most for what is known of
	// its package; default as many as the machine has.
	MachineCPUs int
	// Limits are the operator's. They are ceilings: a request may only ask for
	// less.
	Limits Limits
	// Retries is the most that max-build-restarts can ask for: how often a build
	// is tried again after a transient end. Zero means 20, negative is never.
	Retries int
	// Generation is the operator's part of the sandbox generation: failures of
	// runs with another one are not reused.
	Generation int
	// Network is what builds of fixed outputs reach, but for the rule, which is
	// of the account's settings; nil is nothing.
	Network *usernet.Config
	// Substituter fetches from caches what would have to be built or uploaded;
	// nil if there is none.
	Substituter substituter
	// Logger takes what an operator acts on; default: discarded.
	Logger *slog.Logger
}

// A runner runs builds, each in a guest of its own (*vm.Runner). A build that
// failed is a *vm.BuildError, one that cannot be tried a *vm.SpecError; any
// other error is transient. Run returns soon after ctx ends, with nothing left
// of the guest.
type runner interface {
	Run(ctx context.Context, spec *vm.Spec, log io.Writer, outs vm.Outputs) (*vm.Result, error)
	// These tell of guests what is known now; Qualify and, for one system,
	// Generation find it out, which may take as long as a guest takes to boot.
	Systems() []vm.System
	Features() []vm.Feature
	Emulated(system string) bool
	Generation(ctx context.Context, system string) (string, error)
	Qualify(ctx context.Context, fresh bool) (vm.Status, error)
}

// A substituter brings paths from caches into the own view of a session's
// account. Its methods may be called concurrently.
type substituter interface {
	// Ensure fetches those of paths that are not usable, with their closures, as
	// far as the session's settings allow and caches have them, and returns
	// which of paths are usable then. Progress is shown on log. Caches that cannot
	// be reached, or lie, are no error.
	Ensure(ctx context.Context, s *Session, paths []nixproto.StorePath, log LogSink) (have []nixproto.StorePath, err error)
	// Query says what Ensure would do, and fetches nothing.
	Query(ctx context.Context, s *Session, paths []nixproto.StorePath) (*Substitutable, error)
}

// Builds is the Builder of a real server: it looks up, joins, queues, runs and
// records builds. A request goes through it once from left to right:
//
//	Build ─────────┐
//	BuildPaths ─ graph.go: inputs first, placeholders resolved
//	               └▶ build (request.go): an id, a record, an end
//	                     valid already? ─▶ reuse key ─▶ stored end? (decide.go) ─▶ flight, joined or new
//	                     flight (run.go): queue.go ─▶ vm.Runner, retried
//	                        └▶ outputs.go: references, checks, addresses ─▶ store, record.go
//	                  wait.go: log and end to each that waits, within its own limits
//	                  grant.go: outputs into the view of each
//
// A flight belongs to Builds: it goes on while anybody waits. Methods are safe
// for concurrent use. A Builds is made by NewBuilds and ended with Close.
type Builds struct {
	cfg     BuildsConfig
	store   *store.Store
	queue   *queue
	flights *reuse.Flights[*request, flightEvent, *ending]
	drvs    drvMemos
	live    liveRequests

	ctx     context.Context // of requests that outlive their session; ends in Close
	cancel  context.CancelFunc
	maxKept int // requests of one account that may outlive their session

	mu     sync.Mutex              // guards what follows
	closed bool                    // no request may begin to outlive its session
	keeps  map[store.AccountID]int // requests that may, by account
	kept   sync.WaitGroup          // all of them
}

// defaultMaxKept bounds the requests of one account that no connection holds:
// of the others connections are the bound.
const defaultMaxKept = 1000

var _ Builder = (*Builds)(nil)

// errEnding says that the server no longer takes builds.
var errEnding = errors.New("the server is shutting down")

// NewBuilds returns a Builds. When ctx ends all its builds are cancelled.
func NewBuilds(ctx context.Context, cfg BuildsConfig) (*Builds, error) {
	if cfg.Store == nil || cfg.Runner == nil {
		return nil, errors.New("builds: config lacks a store or a runner")
	}
	if cfg.CPUs == 0 {
		cfg.CPUs = 2
	}
	if cfg.MemoryMiB == 0 {
		cfg.MemoryMiB = 2048
	}
	if err := errors.Join(fillRoom(&cfg), fillScratch(&cfg)); err != nil {
		return nil, fmt.Errorf("builds: %w", err)
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	b := &Builds{
		cfg:   cfg,
		store: cfg.Store,
		queue: newQueue(cfg.Room, cfg.Machine),
		drvs:  drvMemos{accounts: make(map[store.AccountID]*drvMemo)},

		maxKept: defaultMaxKept,
		keeps:   make(map[store.AccountID]int),
	}
	b.flights = reuse.NewFlights[*request, flightEvent](ctx, (*ending).release)
	b.ctx, b.cancel = context.WithCancel(ctx)
	return b, nil
}

// Drain refuses new builds, ends those in the queue, and waits for those that
// run, until ctx ends.
func (b *Builds) Drain(ctx context.Context) error {
	b.queue.close()
	return b.flights.Drain(ctx)
}

// Close refuses new builds, ends those under way and waits for them. Their
// records say that the server ended.
func (b *Builds) Close() {
	b.mu.Lock()
	b.closed = true
	b.mu.Unlock()
	b.queue.close()
	b.flights.Close()
	b.cancel()
	b.kept.Wait()
}

// Offers returns the systems and features that can be built for now.
func (b *Builds) Offers() (systems, features []string) {
	o := b.offered()
	return o.systems, o.features
}

// QueueStatus tells what runs and what waits now.
func (b *Builds) QueueStatus() QueueStatus { return b.queue.status() }

// Queue returns the requests whose builds wait, those that start first first.
func (b *Builds) Queue() []QueuedBuild { return b.queue.waiting() }

// A job is one derivation to build, ready to run: its inputs are valid.
type job struct {
	account store.AccountID
	drvPath nixproto.StorePath
	drv     *nixproto.Derivation // without InputDrvs
	mode    nixproto.BuildMode
	set     policy
	sent    Limits // by the client
	// hash is the hash modulo of the derivation as the client knows it, under
	// which realisations are asked for and answered; resolved is that of drv
	// itself, where that is another derivation, else zero.
	hash, resolved nixproto.Hash
	scratchDrv     nixproto.StorePath // names scratch paths; "" means drvPath
	beforeSelfHash bool               // as in Session
	// restart is the build that this one does again on purpose; nil for what a
	// client asks for.
	restart *store.Build
}

// Build implements Builder.
func (b *Builds) Build(ctx context.Context, s *Session, req *BuildRequest, log LogSink) (*nixproto.BuildResult, error) {
	set, err := b.policy(s, req.Drv, req.Limits)
	if err != nil {
		return b.noteRefused(ctx, s, req.DrvPath, req.Drv, req.Limits, failed(nixproto.InputRejected, err)), nil
	}
	offered, err := b.offeredTo(ctx, req.Drv)
	if err != nil {
		return nil, err
	}
	if err := checkDerivation(req.DrvPath, req.Drv, offered); err != nil {
		return b.noteRefused(ctx, s, req.DrvPath, req.Drv, req.Limits, failed(nixproto.InputRejected, err)), nil
	}
	if kind, _ := req.Drv.Kind(); kind == nixproto.InputAddressed && !s.Client.Can(StoreWrite) {
		return b.buildProven(ctx, s, req, log)
	}
	hash, err := nixproto.NewModulo(nil).RealisationHash(req.Drv) // it has no inputs to look up
	if err != nil {
		return b.noteRefused(ctx, s, req.DrvPath, req.Drv, req.Limits, failed(nixproto.InputRejected, err)), nil
	}
	return b.build(ctx, s, &job{
		account: s.account(),
		drvPath: req.DrvPath,
		drv:     req.Drv,
		mode:    req.Mode,
		set:     set,
		sent:    req.Limits,
		hash:    hash,

		beforeSelfHash: s.beforeSelfHash,
	}, log)
}

// buildProven builds an input-addressed derivation for a key whose word does
// not make a path valid: from the .drv file in the view, whose output paths
// recompute, or not at all.
func (b *Builds) buildProven(ctx context.Context, s *Session, req *BuildRequest, log LogSink) (*nixproto.BuildResult, error) {
	valid, err := s.Sight.Valid(ctx, []nixproto.StorePath{req.DrvPath})
	if err != nil {
		return nil, err
	}
	if len(valid) == 0 {
		return b.noteRefused(ctx, s, req.DrvPath, req.Drv, req.Limits, failed(nixproto.InputRejected, refusef("cannot build '%s': this key lacks the permission store:write, "+
			"so the .drv file and those it depends on are needed to check the output paths", req.DrvPath))), nil
	}
	results, err := b.BuildPaths(ctx, s, &PathsRequest{
		Paths:  []nixproto.DerivedPath{{Path: req.DrvPath, Outputs: req.Drv.OutputNames()}},
		Mode:   req.Mode,
		Limits: req.Limits,
	}, log)
	if err != nil {
		return nil, err
	}
	for name, real := range results[0].Outputs {
		if req.Drv.Outputs[name].Path != real.OutPath {
			return failed(nixproto.InputRejected, refusef("cannot build '%s': its output '%s' is not what the .drv file says", req.DrvPath, name)), nil
		}
	}
	return &results[0].BuildResult, nil
}

// build makes the outputs of one job valid. Its results are those of Build. A
// build that is to go on without its client has a session of its own, which
// keeps its paths.
func (b *Builds) build(ctx context.Context, s *Session, j *job, log LogSink) (*nixproto.BuildResult, error) {
	if !j.set.keep {
		return b.serve(ctx, s, j, log)
	}
	type answer struct {
		result *nixproto.BuildResult
		err    error
	}
	answered := make(chan answer, 1)
	err := b.keep(j, func(ctx context.Context) {
		own := *s
		lease := s.Sight.NewLease()
		defer lease.Release()
		own.leases = lease
		var a answer
		a.result, a.err = b.serve(ctx, &own, j, log)
		if a.err == nil {
			for _, real := range a.result.Outputs {
				s.Keep(real.OutPath)
			}
		}
		answered <- a
	})
	switch {
	case isRefusal(err):
		return b.noteRefused(ctx, s, j.drvPath, j.drv, j.sent, failed(nixproto.MiscFailure, err)), nil
	case errors.Is(err, store.ErrBusy):
		return failed(nixproto.TransientFailure, err), nil
	case err != nil:
		return nil, err
	}
	select {
	case a := <-answered:
		return a.result, a.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// keep calls f, which serves j, in a goroutine that Close waits for, with a
// context that ends then. Its error is errEnding if Close has begun, store.ErrBusy
// or a refusal if there is no room for another one of the account.
func (b *Builds) keep(j *job, f func(ctx context.Context)) error {
	charge := b.store.NewCharge(j.account)
	if err := charge.Set(int64(len(j.drv.ATerm()))); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	var err error
	switch n := b.keeps[j.account]; {
	case b.closed:
		err = errEnding
	case n >= b.maxKept:
		err = refusef("cannot build '%s': its account has %d builds under way that were restarted or go on without a client (keep-builds-running); wait for some of them, or cancel them",
			j.drvPath, n)
	}
	if err != nil {
		charge.Release()
		return err
	}
	b.keeps[j.account]++
	b.kept.Go(func() {
		defer func() {
			charge.Release()
			b.mu.Lock()
			defer b.mu.Unlock()
			if b.keeps[j.account]--; b.keeps[j.account] == 0 {
				delete(b.keeps, j.account)
			}
		}()
		f(b.ctx)
	})
	return nil
}

// CancelAll cancels all requests of an account, also those that no client waits
// for; others that wait for the same runs go on.
func (b *Builds) CancelAll(a store.AccountID, by string) {
	b.live.mu.Lock()
	var all []*request
	for _, r := range b.live.m {
		if r.job.account == a {
			all = append(all, r)
		}
	}
	b.live.mu.Unlock()
	for _, r := range all {
		r.cancel(&cancelled{by})
	}
}

// serve answers one request.
func (b *Builds) serve(ctx context.Context, s *Session, j *job, log LogSink) (*nixproto.BuildResult, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	r, err := b.newRequest(ctx, s, j, cancel)
	if err != nil {
		return nil, err
	}
	return b.serveRequest(ctx, r, log)
}

func (b *Builds) serveRequest(ctx context.Context, r *request, log LogSink) (*nixproto.BuildResult, error) {
	end, err := b.answer(ctx, r, log)
	var c *cancelled
	if err != nil && errors.As(context.Cause(ctx), &c) {
		end, err = c.ending(r.job.drvPath), nil
	}
	r.finish(end, err)
	close(r.done)
	if err != nil {
		return nil, err
	}
	return end.answer(r.job), nil
}

// maxLookups bounds how often a request is looked up anew because an identical
// build ended in between.
const maxLookups = 10

// answer finds what stands in for a run, or runs.
func (b *Builds) answer(ctx context.Context, r *request, log LogSink) (*ending, error) {
	for range maxLookups {
		r.begin()
		if end, err := b.byOutputs(ctx, r, log); end != nil || err != nil {
			return end, err
		}
		end, err := b.byKey(ctx, r, log)
		if err != nil || !end.again {
			return end, err
		}
	}
	return &ending{status: reuse.InternalError, code: nixproto.TransientFailure, drvPath: r.job.drvPath,
		message: fmt.Sprintf("cannot build '%s': what stands in for it came and went again and again", r.job.drvPath)}, nil
}

// byOutputs ends a request whose outputs need no build; nil if they do.
func (b *Builds) byOutputs(ctx context.Context, r *request, log LogSink) (*ending, error) {
	s, j := r.session, r.job
	if j.mode != nixproto.BuildNormal {
		s.Keep(staticOutputs(j.drv)...)
	}
	known, err := b.knownOutputs(ctx, s, j)
	fetched, notFetched := false, ""
	if err == nil && j.mode == nixproto.BuildNormal && !known.complete {
		if fetched, notFetched, err = b.fetchOutputs(ctx, s, j, log); fetched {
			known, err = b.knownOutputs(ctx, s, j)
		}
	}
	if err != nil {
		return nil, err
	}
	valid := &ending{status: reuse.Built, code: nixproto.AlreadyValid, drvPath: j.drvPath, paths: known.paths}
	switch {
	case j.mode == nixproto.BuildNormal && known.complete:
		if fetched {
			r.decide("cache", true, "a cache of the account has the outputs")
		} else {
			r.decide("outputs", true, "all outputs are valid already")
		}
		return valid, nil
	case j.mode == nixproto.BuildCheck && !known.complete:
		return &ending{status: reuse.ClientError, code: nixproto.MiscFailure, drvPath: j.drvPath,
			message: fmt.Sprintf("some outputs of '%s' are not valid, so it cannot be checked", j.drvPath)}, nil
	case j.mode == nixproto.BuildRepair && known.complete:
		intact, err := b.intact(ctx, s, known.paths)
		if err != nil {
			return nil, err
		}
		if intact {
			r.decide("outputs", true, "all outputs are valid and intact")
			return valid, nil
		}
	}
	r.decide("outputs", false, "not all outputs are valid")
	if notFetched != "" {
		r.decide("cache", false, notFetched)
	}
	return nil, nil
}

// byKey ends a request with a stored end under its key, with that of an
// identical build, or with that of a run.
func (b *Builds) byKey(ctx context.Context, r *request, log LogSink) (*ending, error) {
	j := r.job
	inputs, missing, err := b.inputs(ctx, r.session, j, log)
	if err != nil {
		return nil, err
	}
	if len(missing) > 0 {
		return &ending{status: reuse.ClientError, code: nixproto.MiscFailure, drvPath: j.drvPath, message: missingInputs(j.drvPath, missing)}, nil
	}
	defer inputs.lease.Release()
	if j.mode == nixproto.BuildNormal { // nothing stands in for a check or repair, nor they for it
		r.keyed(inputs.key)
	}
	stored, err := b.findStored(ctx, r.session, j, inputs.key, r.decide)
	if err != nil {
		return nil, err
	}
	if stored != nil {
		defer stored.close()
		return b.useStored(ctx, r, stored, log)
	}
	return b.fly(ctx, r, inputs, log)
}

// fly waits for the flight of a request, joined or new, until its end or ctx's,
// and takes its outputs into the account's view.
func (b *Builds) fly(ctx context.Context, r *request, in *jobInputs, log LogSink) (end *ending, err error) {
	j := r.job
	// The flight holds its inputs by itself: it may outlive this request.
	lease := r.session.Sight.NewLease()
	lease.Add(j.drv.InputSrcs...)
	lease.Add(staticOutputs(j.drv)...)
	b.planFor(ctx, r)
	run := func(f *flight) *ending {
		defer lease.Release()
		return b.run(f, r, in, lease)
	}
	refused, err := b.mayRun(ctx, r)
	if err != nil {
		lease.Release()
		return nil, err
	}
	var w *waiter
	var started bool
	switch {
	case j.mode == nixproto.BuildNormal && j.set.reuse != settings.ReuseNone:
		if refused != nil {
			run = nil // it may join another's
		}
		w, started, err = b.flights.Join(reuse.FlightID{Scope: j.scope(), Key: in.key}, r, run)
	case refused == nil:
		w, err = b.flights.Start(r, run)
		started = true
	}
	if !started || err != nil {
		lease.Release()
		b.live.unclaim(r)
	}
	if errors.Is(err, reuse.ErrClosed) {
		return nil, errEnding
	} else if err != nil {
		return nil, err
	}
	if w == nil {
		r.decide("run", false, refused.message)
		return refused, nil
	}
	if err := r.boarded(ctx, w, started, log); err != nil {
		w.Leave(nil)
		return nil, err
	}
	var why error // of leaving
	defer func() {
		if w.Leave(why) {
			r.handOver(w.Members())
		} else if why != nil { // who is told of the end finds it in the record, and the guest gone
			<-w.Landed()
		}
	}()
	end, why, err = b.wait(ctx, w, r, log)
	if err == nil && end.starved(j) {
		end = &ending{again: true}
	}
	if err == nil && end.results != nil {
		own := *end // the paths are the same for all that wait; the answer may not be
		return b.enter(ctx, r, &own, end.results)
	}
	return end, err
}

// boarded notes that a request waits for a flight, and says so if it is
// another's.
func (r *request) boarded(ctx context.Context, w *waiter, started bool, log LogSink) error {
	if started {
		r.decide("running", false, "no identical build is under way")
		r.decide("run", true, "nothing stands in for a run")
		return nil
	}
	what := "an identical build"
	for _, other := range w.Members() {
		if other.job.account == r.job.account && other.owned() != nil {
			what = fmt.Sprintf("build %d", other.id())
		}
	}
	r.decide("running", true, what+" is under way")
	log.Note(fmt.Sprintf("'%s' is being built already; waiting for %s", r.job.drvPath, what))
	return r.joined(ctx)
}

// mayRun says why a request must not start a run; nil if it may, and counts as
// one that is under way then.
func (b *Builds) mayRun(ctx context.Context, r *request) (*ending, error) {
	j := r.job
	refuse := func(text string) *ending {
		return &ending{status: reuse.ClientError, code: nixproto.MiscFailure, drvPath: j.drvPath, message: fmt.Sprintf("cannot build '%s': %s", j.drvPath, text)}
	}
	if hours := j.set.monthly; hours != nil {
		used, err := b.store.Usage(ctx, j.account, time.Now())
		if err != nil {
			return nil, err
		}
		if float64(used.LimitSeconds) >= *hours*3600 {
			return refuse(fmt.Sprintf("its account has used %.2f of the %g CPU hours that max-cpu-hours-per-month allows; what was built before is still served",
				float64(used.LimitSeconds)/3600, *hours)), nil
		}
	}
	if n := j.set.maxRunning; !b.live.claim(r, n) {
		return refuse(fmt.Sprintf("its account has %d builds under way, as many as max-running-builds allows", n)), nil
	}
	return nil, nil
}

// jobInputs are the inputs of a job, held for it.
type jobInputs struct {
	key   reuse.Key
	lease *store.Lease
}

// inputs finds the inputs of j, brings from caches what is missing, and
// computes the key, or names the inputs that are not there. The caller releases
// the lease unless there was an error or something is missing.
func (b *Builds) inputs(ctx context.Context, s *Session, j *job, log LogSink) (in *jobInputs, missing []nixproto.StorePath, err error) {
	lease := s.Sight.NewLease()
	defer func() {
		if in == nil {
			lease.Release()
		}
	}()
	lease.Add(j.drv.InputSrcs...)
	if err := b.fetchInputs(ctx, s, j, log); err != nil {
		return nil, nil, err
	}
	valid, err := s.Sight.Valid(ctx, j.drv.InputSrcs)
	if err != nil {
		return nil, nil, err
	}
	if len(valid) < len(j.drv.InputSrcs) {
		return nil, without(j.drv.InputSrcs, valid), nil
	}
	_, roots, err := s.Sight.InputRoots(ctx, j.drv.InputSrcs)
	if err != nil {
		return nil, nil, err
	}
	key, err := j.keyOf(reuse.KeyOfRoots(j.drv, roots))
	if err != nil {
		return nil, nil, err
	}
	return &jobInputs{key, lease}, nil, nil
}

// keyOf is the key of the job whose derivation and inputs have a key.
func (j *job) keyOf(key reuse.Key, err error) (reuse.Key, error) {
	if kind, _ := j.drv.Kind(); err == nil && j.beforeSelfHash && kind == nixproto.Floating {
		key = key.Variant("content addresses of Nix before 2.17")
	}
	return key, err
}

// knownPaths are the paths of a job's outputs as far as they are known and
// valid.
type knownPaths struct {
	paths    map[string]nixproto.StorePath
	complete bool // all outputs are valid
}

// knownOutputs finds which outputs of j are valid, and keeps those for the
// session.
func (b *Builds) knownOutputs(ctx context.Context, s *Session, j *job) (*knownPaths, error) {
	return b.findOutputs(ctx, s, j.drv, j.hash, j.resolved)
}

// findOutputs finds which outputs of drv are valid in the session's view, and
// keeps those. The paths of outputs that are not static are looked up under
// the hashes given; zero ones stand for nothing.
func (b *Builds) findOutputs(ctx context.Context, s *Session, drv *nixproto.Derivation, hashes ...nixproto.Hash) (*knownPaths, error) {
	paths := make(map[string]nixproto.StorePath)
	for name, out := range drv.Outputs {
		if out.Path != "" {
			paths[name] = out.Path
			continue
		}
		for _, hash := range hashes {
			if hash.IsZero() {
				continue
			}
			real, err := s.Sight.Realisation(ctx, hash, name)
			if errors.Is(err, store.ErrNotFound) {
				continue
			} else if err != nil {
				return nil, err
			}
			paths[name] = real.OutPath
			break
		}
	}
	wanted := slices.Sorted(maps.Values(paths))
	s.Keep(wanted...)
	valid, err := s.Sight.Valid(ctx, wanted)
	if err != nil {
		return nil, err
	}
	maps.DeleteFunc(paths, func(_ string, p nixproto.StorePath) bool { return !slices.Contains(valid, p) })
	return &knownPaths{paths, len(paths) == len(drv.Outputs)}, nil
}

// staticOutputs returns the output paths of drv that are known beforehand.
func staticOutputs(drv *nixproto.Derivation) []nixproto.StorePath {
	var paths []nixproto.StorePath
	for _, name := range drv.OutputNames() {
		if p := drv.Outputs[name].Path; p != "" {
			paths = append(paths, p)
		}
	}
	return paths
}

// without returns the members of all that are not in some, sorted.
func without(all, some []nixproto.StorePath) []nixproto.StorePath {
	have := make(map[nixproto.StorePath]bool, len(some))
	for _, p := range some {
		have[p] = true
	}
	var rest []nixproto.StorePath
	for _, p := range all {
		if !have[p] {
			rest = append(rest, p)
		}
	}
	slices.Sort(rest)
	return slices.Compact(rest)
}

// missingInputs is the message about inputs that are not valid; it names a few.
func missingInputs(drv nixproto.StorePath, missing []nixproto.StorePath) string {
	const most = 10
	var text strings.Builder
	fmt.Fprintf(&text, "cannot build '%s': these inputs are not valid in your store on this server:", drv)
	for _, p := range missing[:min(most, len(missing))] {
		fmt.Fprintf(&text, "\n  %s", p)
	}
	if more := len(missing) - most; more > 0 {
		fmt.Fprintf(&text, "\n  and %d more", more)
	}
	return text.String()
}

// failed is the result of a request that could not be tried.
func failed(status nixproto.BuildStatus, err error) *nixproto.BuildResult {
	return &nixproto.BuildResult{Status: status, Error: printable(err.Error())}
}

// builtOutputs are realisations of the outputs at paths.
func builtOutputs(hash nixproto.Hash, paths map[string]nixproto.StorePath) map[string]nixproto.Realisation {
	outputs := make(map[string]nixproto.Realisation, len(paths))
	for name, p := range paths {
		outputs[name] = nixproto.Realisation{DrvHash: hash, OutputName: name, OutPath: p}
	}
	return outputs
}

// account is the view that the session uses.
func (s *Session) account() store.AccountID { return s.Client.Account.ID }

// seconds rounds a limit up for people.
func seconds(d time.Duration) int64 { return int64((d + time.Second - 1) / time.Second) }
