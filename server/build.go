package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"nbd/nixproto"
	"nbd/reuse"
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
	Offers(system string) bool
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
	if err := b.checkDerivation(ctx, req.DrvPath, req.Drv); isRefusal(err) {
		return b.noteRefused(ctx, s, req.DrvPath, req.Drv, req.Limits, failed(nixproto.InputRejected, err)), nil
	} else if err != nil {
		return nil, err
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
