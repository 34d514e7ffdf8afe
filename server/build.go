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
	"time"

	"nbd/nixproto"
	"nbd/reuse"
	"nbd/store"
	"nbd/vm"
)

// BuildsConfig says what Builds works with. Store and Runner are required; the
// zero value of every other field works.
type BuildsConfig struct {
	Store  *store.Store
	Runner runner
	// Systems are those that can be built for; default x86_64-linux and
	// i686-linux. Features are those offered; default big-parallel, benchmark
	// and ca-derivations.
	Systems, Features []string
	// Room is what all guests together may take. Zero fields mean: as many
	// guests as the other two allow, three quarters of the machine's memory,
	// and twice its CPUs.
	Room Room
	// CPUs of a guest; default 2.
	CPUs int
	// MemoryMiB is what a build is given at first; default 2048. One that runs
	// out of it is tried again with twice as much, up to MaxMemoryMiB; default
	// as much as Room allows.
	MemoryMiB, MaxMemoryMiB int
	// ScratchMiB is the writable disk of a guest; zero means the guest's default.
	ScratchMiB int
	// Limits are the operator's. They are ceilings: a request may only ask for
	// less.
	Limits Limits
	// Retries is how often a build is tried again after a transient end; default
	// 3, negative for never.
	Retries int
	// Logger takes what an operator acts on; default: discarded.
	Logger *slog.Logger
}

// A runner runs builds, each in a guest of its own (*vm.Runner). A build that
// failed is a *vm.BuildError, one that cannot be tried a *vm.SpecError; any
// other error is transient. Run returns soon after ctx ends, with nothing left
// of the guest.
type runner interface {
	Run(ctx context.Context, spec *vm.Spec, log io.Writer, outs vm.Outputs) (*vm.Result, error)
	// Status and Generation tell of guests what is known now.
	Status() vm.Status
	Generation() string
}

// Builds is the Builder of a real server: it looks up, joins, queues, runs and
// records builds. A request goes through it once from left to right:
//
//	Build ─────────┐
//	BuildPaths ─ graph.go: inputs first, placeholders resolved
//	               └▶ build: valid already? ─▶ reuse key ─▶ flight, joined or new
//	                     flight (run.go): record ─▶ queue.go ─▶ vm.Runner, retried
//	                        └▶ outputs.go: references, checks, addresses ─▶ store
//	                  wait.go: log and end to each that waits, within its own limits
//
// A flight belongs to Builds: it goes on while anybody waits. Methods are safe
// for concurrent use. A Builds is made by NewBuilds and ended with Close.
type Builds struct {
	cfg     BuildsConfig
	store   *store.Store
	queue   *queue
	flights *reuse.Flights[*request, flightEvent, *ending]
	drvs    drvMemos
}

var _ Builder = (*Builds)(nil)

// errEnding says that the server no longer takes builds.
var errEnding = errors.New("the server is shutting down")

// NewBuilds returns a Builds. When ctx ends all its builds are cancelled.
func NewBuilds(ctx context.Context, cfg BuildsConfig) (*Builds, error) {
	if cfg.Store == nil || cfg.Runner == nil {
		return nil, errors.New("builds: config lacks a store or a runner")
	}
	if cfg.Systems == nil {
		cfg.Systems = []string{"x86_64-linux", "i686-linux"}
	}
	if cfg.Features == nil {
		cfg.Features = []string{"big-parallel", "benchmark", "ca-derivations"}
	}
	if cfg.CPUs == 0 {
		cfg.CPUs = 2
	}
	if cfg.MemoryMiB == 0 {
		cfg.MemoryMiB = 2048
	}
	if err := fillRoom(&cfg); err != nil {
		return nil, fmt.Errorf("builds: %w", err)
	}
	if cfg.Retries == 0 {
		cfg.Retries = 3
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Builds{
		cfg:     cfg,
		store:   cfg.Store,
		queue:   newQueue(cfg.Room),
		flights: reuse.NewFlights[*request, flightEvent, *ending](ctx, nil),
		drvs:    drvMemos{accounts: make(map[store.AccountID]*drvMemo)},
	}, nil
}

// Drain refuses new builds and waits for those under way, until ctx ends.
func (b *Builds) Drain(ctx context.Context) error { return b.flights.Drain(ctx) }

// Close refuses new builds, ends those under way and waits for them. Their
// records say that the server ended.
func (b *Builds) Close() { b.flights.Close() }

// Offers returns the systems and features that can be built for.
func (b *Builds) Offers() (systems, features []string) {
	return slices.Clone(b.cfg.Systems), slices.Clone(b.cfg.Features)
}

// QueueStatus tells what runs and what waits now.
func (b *Builds) QueueStatus() QueueStatus { return b.queue.status() }

// A job is one derivation to build, ready to run: its inputs are valid.
type job struct {
	account store.AccountID
	drvPath nixproto.StorePath
	drv     *nixproto.Derivation // without InputDrvs
	mode    nixproto.BuildMode
	limits  Limits
	// hash is the hash modulo of the derivation as the client knows it, under
	// which realisations are asked for and answered; resolved is that of drv
	// itself, where that is another derivation, else zero.
	hash, resolved nixproto.Hash
	scratchDrv     nixproto.StorePath // names scratch paths; "" means drvPath
	beforeSelfHash bool               // as in Session
}

// Build implements Builder.
func (b *Builds) Build(ctx context.Context, s *Session, req *BuildRequest, log LogSink) (*nixproto.BuildResult, error) {
	limits, err := b.limits(s.Env, req.Limits)
	if err != nil {
		return failed(nixproto.InputRejected, err), nil
	}
	if err := checkDerivation(req.DrvPath, req.Drv, b.cfg.Systems, b.cfg.Features); err != nil {
		return failed(nixproto.InputRejected, err), nil
	}
	if kind, _ := req.Drv.Kind(); kind == nixproto.InputAddressed && !s.Client.Can(StoreWrite) {
		return b.buildProven(ctx, s, req, log)
	}
	hash, err := nixproto.NewModulo(nil).RealisationHash(req.Drv) // it has no inputs to look up
	if err != nil {
		return failed(nixproto.InputRejected, err), nil
	}
	return b.build(ctx, s, &job{
		account: s.account(),
		drvPath: req.DrvPath,
		drv:     req.Drv,
		mode:    req.Mode,
		limits:  limits,
		hash:    hash,

		beforeSelfHash: s.beforeSelfHash,
	}, log)
}

// buildProven builds an input-addressed derivation for a key whose word does
// not make a path valid: from the .drv file in the view, whose output paths
// recompute, or not at all.
func (b *Builds) buildProven(ctx context.Context, s *Session, req *BuildRequest, log LogSink) (*nixproto.BuildResult, error) {
	valid, err := b.store.Valid(ctx, s.account(), []nixproto.StorePath{req.DrvPath})
	if err != nil {
		return nil, err
	}
	if len(valid) == 0 {
		return failed(nixproto.InputRejected, refusef("cannot build '%s': this key lacks the permission store:write, "+
			"so the .drv file and those it depends on are needed to check the output paths", req.DrvPath)), nil
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

// build makes the outputs of one job valid. Its results are those of Build.
func (b *Builds) build(ctx context.Context, s *Session, j *job, log LogSink) (*nixproto.BuildResult, error) {
	for range maxLookups {
		if j.mode != nixproto.BuildNormal {
			s.Keep(staticOutputs(j.drv)...)
		}
		known, err := b.knownOutputs(ctx, s, j)
		if err != nil {
			return nil, err
		}
		switch {
		case j.mode == nixproto.BuildNormal && known.complete:
			return succeeded(nixproto.AlreadyValid, j, known.paths), nil
		case j.mode == nixproto.BuildCheck && !known.complete:
			return failed(nixproto.MiscFailure, refusef("some outputs of '%s' are not valid, so it cannot be checked", j.drvPath)), nil
		case j.mode == nixproto.BuildRepair && known.complete:
			intact, err := b.intact(ctx, j.account, known.paths)
			if err != nil {
				return nil, err
			}
			if intact {
				return succeeded(nixproto.AlreadyValid, j, known.paths), nil
			}
		}
		end, err := b.fly(ctx, j, log)
		if err != nil {
			return nil, err
		}
		if end.status != reuse.Built {
			return end.answer(j), nil
		}
		// The flight's hold on the outputs has ended; see that they are still
		// there under the session's.
		paths := slices.Sorted(maps.Values(end.paths))
		s.Keep(paths...)
		valid, err := b.store.Valid(ctx, j.account, paths)
		if err != nil {
			return nil, err
		}
		if len(valid) == len(paths) {
			return end.answer(j), nil
		}
	}
	return failed(nixproto.TransientFailure, refusef("outputs of '%s' were deleted again and again", j.drvPath)), nil
}

// maxLookups bounds how often a build is looked up anew because somebody
// deleted its outputs just after it ended.
const maxLookups = 3

// fly waits for the flight of j, joined or new, until its end or ctx's. A
// flight that ended by a limit that is not j's is no answer; another one is
// started then.
func (b *Builds) fly(ctx context.Context, j *job, log LogSink) (*ending, error) {
	inputs, missing, err := b.inputs(ctx, j)
	if err != nil {
		return nil, err
	}
	if len(missing) > 0 {
		return &ending{status: reuse.ClientError, code: nixproto.MiscFailure, message: missingInputs(j.drvPath, missing)}, nil
	}
	defer inputs.lease.Release()
	for {
		run := func(f *flight) *ending { return b.run(f, j, inputs) }
		var w *waiter
		var started bool
		if j.mode == nixproto.BuildNormal {
			w, started, err = b.flights.Join(reuse.FlightID{Scope: uint64(j.account), Key: inputs.key}, nil, run)
		} else {
			w, err = b.flights.Start(nil, run)
			started = true
		}
		if errors.Is(err, reuse.ErrClosed) {
			return nil, errEnding
		} else if err != nil {
			return nil, err
		}
		end, err := b.wait(ctx, w, j, started, log)
		if err != nil || !end.otherLimit(j.limits) {
			return end, err
		}
	}
}

// jobInputs are the inputs of a job, held for it.
type jobInputs struct {
	closure []nixproto.PathInfo
	key     reuse.Key
	lease   *store.Lease
}

// inputs finds the closure of j's inputs and computes the key, or names the
// inputs that are not valid. The caller releases the lease unless there was an
// error or something is missing.
func (b *Builds) inputs(ctx context.Context, j *job) (in *jobInputs, missing []nixproto.StorePath, err error) {
	lease := b.store.NewLease(j.account)
	defer func() {
		if in == nil {
			lease.Release()
		}
	}()
	lease.Add(j.drv.InputSrcs...)
	valid, err := b.store.Valid(ctx, j.account, j.drv.InputSrcs)
	if err != nil {
		return nil, nil, err
	}
	if len(valid) < len(j.drv.InputSrcs) {
		return nil, without(j.drv.InputSrcs, valid), nil
	}
	closure, err := b.store.ClosureInfo(ctx, j.account, j.drv.InputSrcs)
	if err != nil {
		return nil, nil, err
	}
	infos := make([]*nixproto.PathInfo, len(closure))
	for i := range closure {
		infos[i] = &closure[i]
	}
	key, err := reuse.NewKey(j.drv, infos)
	if err != nil {
		return nil, nil, err
	}
	if kind, _ := j.drv.Kind(); j.beforeSelfHash && kind == nixproto.Floating {
		key = key.Variant("content addresses of Nix before 2.17")
	}
	return &jobInputs{closure, key, lease}, nil, nil
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
			real, err := b.store.Realisation(ctx, s.account(), hash, name)
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
	valid, err := b.store.Valid(ctx, s.account(), wanted)
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

// succeeded is the result of a job whose outputs are at paths.
func succeeded(status nixproto.BuildStatus, j *job, paths map[string]nixproto.StorePath) *nixproto.BuildResult {
	return &nixproto.BuildResult{Status: status, Outputs: builtOutputs(j.hash, paths)}
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
