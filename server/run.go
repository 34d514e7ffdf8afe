package server

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"nbd/nixproto"
	"nbd/reuse"
	"nbd/store"
	"nbd/vm"
)

// The life of a flight, from its start to its end, is in this file; wait.go is
// the other side of it. A flight makes attempts until one ends in a way that
// another attempt would not change. Its record is that of the request that owns
// the attempt (request.go).
//
//	queue ─▶ record (running), log ─▶ guest ─▶ outputs ─▶ record and end, durable together
//	  ▲                                 │
//	  └── transient, or more memory or disk may help

type (
	flight = reuse.Flight[*request, flightEvent, *ending]
	waiter = reuse.Waiter[*request, flightEvent, *ending]
)

// A flightEvent is what a flight tells those who wait for it; one field is set.
type flightEvent struct {
	place   string   // it waits in the queue, there
	attempt *attempt // it runs, and has a log
	note    string   // a line for the client, outside the log
	// broke is the transient end of an attempt after which there is another one,
	// because somebody among waited wants it.
	broke  *ending
	waited []*request
}

// An ending is how a request ended, or the flight that many waited for. It does
// not change once it was told.
type ending struct {
	status  reuse.Status
	code    nixproto.BuildStatus
	message string // for the client; empty on success
	// drvPath is what message calls the derivation.
	drvPath nixproto.StorePath
	// hopeless says that the same would happen again at once.
	hopeless bool
	// again says that nothing was run, because what was looked up before is not
	// so any more: each has to look again.
	again bool
	// paths are those of all outputs, after a success.
	paths map[string]nixproto.StorePath
	// results are the outputs with their contents, to be granted to each that
	// waited, and hold keeps the contents until then.
	results map[string]store.ResultOutput
	hold    *store.Hold
	outputs []store.BuildOutput // for records
	// result tells of the run; zero if none came so far.
	result vm.Result
	// build is the run, of account, and log has its log.
	build   store.BuildID
	account store.AccountID
	log     store.BuildID
	// counts says that what it cost counts against a monthly limit, whatever its
	// status.
	counts bool
	// crashed says that the builder died as on a faulty processor.
	crashed bool
	// memoryMiB is what the guest had.
	memoryMiB int
	// short says what the guest had too little of: vm.OutOfMemory, vm.NoSpace,
	// vm.ProcessLimit; 0 if nothing.
	short vm.Kind
	// kind and after are those of a timeout.
	kind  string
	after time.Duration
}

// starved reports whether a run that failed had less memory than j would begin
// with: not every builder that lacks some is killed for it.
func (e *ending) starved(j *job) bool {
	return e.status == reuse.BuildFailed && e.memoryMiB > 0 && e.memoryMiB < j.set.memoryMiB
}

// release gives back what an ending holds, when nobody waits any more.
func (e *ending) release() { e.hold.Release() }

// answer is the result for a client that asked for j.
func (e *ending) answer(j *job) *nixproto.BuildResult {
	r := &nixproto.BuildResult{Status: e.code, Error: e.message}
	if e.message != "" && e.drvPath != j.drvPath && e.drvPath != "" {
		r.Error = strings.ReplaceAll(e.message, string(e.drvPath), string(j.drvPath))
	}
	if e.status == reuse.Built {
		r.Outputs = builtOutputs(j.hash, e.paths)
	}
	if !e.result.Start.IsZero() {
		r.TimesBuilt = 1
		r.StartTime, r.StopTime = e.result.Start.Unix(), e.result.Stop.Unix()
		user, system := e.result.CPUUser.Microseconds(), e.result.CPUSystem.Microseconds()
		r.CPUUser, r.CPUSystem = &user, &system
	}
	return r
}

// run is the goroutine of a flight that the request r started.
func (b *Builds) run(f *flight, r *request, in *jobInputs, lease *store.Lease) *ending {
	j := r.job
	closure, again, err := b.ready(f.Context(), r, in)
	switch {
	case err != nil && f.Context().Err() != nil:
		return b.cancelled(f.Context(), j)
	case err != nil:
		return b.broken(j, "look again", err)
	case again:
		return &ending{again: true}
	}
	a := &attempt{job: j, key: in.key, closure: closure, lease: lease, limits: b.cfg.Limits}
	for transient := 0; ; {
		end := b.attempt(f, a)
		if !end.status.Retried() || end.hopeless || f.Context().Err() != nil {
			return end
		}
		next := &attempt{job: j, key: in.key, closure: closure, lease: lease, limits: a.limits, memoryMiB: a.memoryMiB, diskMiB: a.diskMiB, writesMiB: a.writesMiB, before: a}
		if end.status == reuse.OutOfMemory {
			next.memoryMiB, next.diskMiB, next.why = a.more(end, b.ceiling(f), b.cfg.MaxScratchMiB)
			with := fmt.Sprintf("%d MiB", next.memoryMiB)
			if end.short == vm.NoSpace {
				next.writesMiB = next.diskMiB
				with = fmt.Sprintf("%d MiB of disk", next.diskMiB)
			}
			f.Tell(flightEvent{note: fmt.Sprintf("%s; trying again with %s", end.message, with)})
		} else {
			waited, restarts := restartsOf(f)
			if transient++; transient > restarts {
				return end
			}
			next.transient = transient
			f.Tell(flightEvent{note: fmt.Sprintf("%s; trying again (%d of %d)", end.message, transient, restarts), broke: end, waited: waited})
		}
		a = next
	}
}

// ready returns the closure of a flight's inputs; again says that an identical
// build ended just before this flight began, or that the inputs are others now.
func (b *Builds) ready(ctx context.Context, r *request, in *jobInputs) (closure []nixproto.PathInfo, again bool, err error) {
	j := r.job
	stored, err := b.findStored(ctx, r.session, j, in.key, func(string, bool, string) {})
	if err != nil {
		return nil, false, err
	}
	if stored != nil {
		stored.close()
		return nil, true, nil
	}
	if closure, err = r.session.Sight.ClosureInfo(ctx, j.drv.InputSrcs); err != nil {
		return nil, false, err
	}
	infos := make([]*nixproto.PathInfo, len(closure))
	for i := range closure {
		infos[i] = &closure[i]
	}
	// What is built and stored under the key must be what the key is of, even
	// if an upload put another content in place of a lent one meanwhile.
	key, err := j.keyOf(reuse.NewKey(j.drv, infos))
	return closure, key != in.key, err
}

// ceiling is the most memory that somebody who waits allows, in MiB.
func (b *Builds) ceiling(f *flight) int {
	most := 0
	members, _ := f.Members()
	for _, m := range members {
		most = max(most, m.job.set.maxMemoryMiB)
	}
	return most
}

// restartsOf returns who waits, and how often one of them wants transient ends
// tried again.
func restartsOf(f *flight) (members []*request, most int) {
	members, _ = f.Members()
	for _, m := range members {
		most = max(most, m.job.set.restarts)
	}
	return members, most
}

// An attempt is one run of a flight's build.
type attempt struct {
	job     *job // of the request that started the flight
	key     reuse.Key
	closure []nixproto.PathInfo // of the inputs
	lease   *store.Lease        // on inputs and outputs
	limits  Limits              // that the guest itself watches
	before  *attempt            // that this one repeats; nil if it is the first
	// transient is how many attempts before ended so.
	transient int

	// Set when it leaves the queue; memoryMiB and diskMiB are the least before.
	memoryMiB, diskMiB, cpus int
	// writesMiB is the least that it is expected to write.
	writesMiB int
	// wantedBy is the request whose wish that was; why is set if it is the end of
	// the attempt before.
	wantedBy store.BuildID
	why      string
	log      *runLog
	logID    store.BuildID

	mu    sync.Mutex // guards what follows; taken before request.mu
	owner *request   // whose record it has
	ended bool       // the record is written
}

// attempt makes one attempt and leaves a record of it.
func (b *Builds) attempt(f *flight, a *attempt) *ending {
	ctx, j := f.Context(), a.job
	if err := b.giveOwner(f, a); err != nil {
		return b.broken(j, "record the build", err)
	}
	got, release, err := b.queue.acquire(ctx, b.wants(f, a), func(p queuePlace) {
		b.queuedRecord(a)
		f.Tell(flightEvent{place: p.String()})
	})
	var end *ending
	if err != nil {
		end = b.unqueued(ctx, j, err)
	} else {
		a.memoryMiB, a.diskMiB, a.cpus, a.wantedBy = got.memoryMiB, got.diskMiB, got.need.CPUs, got.build
		end = b.runGuest(f, a)
		release()
	}
	if err := b.endRecord(a, end); err != nil {
		end.release()
		return b.broken(j, "record the build", err)
	}
	return end
}

// wants returns what the guest of an attempt would take of the machine for each
// that waits, and a channel that is closed when others do. Disk is sparse: all
// get as much as the one who wants most.
func (b *Builds) wants(f *flight, a *attempt) func() ([]want, <-chan struct{}) {
	return func() (list []want, changed <-chan struct{}) {
		members, changed := f.Members()
		disk, writes := a.diskMiB, a.writesMiB
		for _, m := range members {
			p := m.planned()
			disk, writes = max(disk, p.diskMiB), max(writes, p.writesMiB)
			memory := min(max(a.memoryMiB, p.memoryMiB), b.cfg.MaxMemoryMiB)
			list = append(list, want{account: m.job.account, build: m.id(), memoryMiB: memory, leastCPUs: p.leastCPUs,
				need: Room{Guests: 1, MemoryMiB: vm.MemoryCostMiB(memory), CPUs: p.cpus}})
		}
		for i := range list {
			list[i].diskMiB, list[i].writesMiB = disk, writes
		}
		return list, changed
	}
}

// unqueued is the end of a build that never got its turn.
func (b *Builds) unqueued(ctx context.Context, j *job, err error) *ending {
	var large *errTooLarge
	switch {
	case errors.As(err, &large):
		return &ending{status: reuse.ClientError, code: nixproto.MiscFailure, drvPath: j.drvPath, message: fmt.Sprintf("cannot build '%s': %v", j.drvPath, err)}
	case errors.Is(err, errEnding):
		return shuttingDown(j)
	}
	return b.cancelled(ctx, j)
}

// shuttingDown is the end of a build that the server's end prevents.
func shuttingDown(j *job) *ending {
	return &ending{status: reuse.InternalError, code: nixproto.TransientFailure, hopeless: true, drvPath: j.drvPath,
		message: fmt.Sprintf("cannot build '%s': %v", j.drvPath, reuse.ErrClosed)}
}

// runGuest runs the builder, registers its outputs and says how that ended. A
// defect of ours that panics ends this build alone.
func (b *Builds) runGuest(f *flight, a *attempt) (end *ending) {
	j := a.job
	defer func() {
		if p := recover(); p != nil {
			end = b.broken(j, "build", fmt.Errorf("panic: %v\n%s", p, debug.Stack()))
		}
	}()
	ctx := f.Context()
	// The first build of a server may come before the generation is known, and
	// its failure counts as well.
	generation, err := b.generation(ctx, j.drv.System)
	if err != nil {
		return b.failedRun(f, a, err, 0)
	}
	if err := b.startRecord(a, generation); err != nil {
		return b.broken(j, "record the build", err)
	}
	file, err := b.store.CreateBuildLog(ctx, a.logID)
	if err != nil {
		return b.broken(j, "create the log", err)
	}
	a.log = newRunLog(file, time.Now())
	defer a.log.Close() // it is closed below; here after a panic
	if b.cfg.Runner.Emulated(j.drv.System) {
		lack := "no KVM for " + j.drv.System
		if j.drv.System == "builtin" { // that is no kind of machine
			lack = "no KVM"
		}
		f.Tell(flightEvent{note: fmt.Sprintf("'%s' is built in an emulated machine (TCG), because this server has %s: it takes many times as long", j.drvPath, lack)})
	}
	f.Tell(flightEvent{attempt: a})

	produced, err := b.newProduced(a)
	if err != nil {
		return b.broken(j, "prepare outputs", err)
	}
	defer produced.discard()
	result, err := b.cfg.Runner.Run(ctx, produced.spec(b, a), a.log, produced)
	ran := time.Since(a.log.started)
	// Compressing the log takes as long as registering outputs does. Those who
	// follow it come to its end at once.
	closed := make(chan error, 1)
	go func() { closed <- a.log.Close() }()
	if err == nil {
		end, err = b.finish(ctx, f, a, produced)
	}
	logErr := <-closed
	if logErr != nil {
		// What the builder made is right without its log.
		b.cfg.Logger.Error("cannot keep the log of a build", "build", a.logID, "err", logErr)
	}
	if err != nil {
		end = b.failedRun(f, a, err, ran)
	}
	if result != nil {
		end.result = *result
	}
	b.tellNetwork(f, j, end.result.Network, end.status != reuse.Built)
	if logErr == nil {
		end.log = a.logID
	}
	end.memoryMiB = a.memoryMiB
	return end
}

// failedRun is the end of a run that brought no outputs.
func (b *Builds) failedRun(f *flight, a *attempt, err error, ran time.Duration) *ending {
	ctx, j := f.Context(), a.job
	var build *vm.BuildError
	var output *outputError
	var spec *vm.SpecError
	switch {
	case ctx.Err() != nil:
		return b.cancelled(ctx, j)
	case errors.As(err, &output):
		return &ending{status: reuse.BuildFailed, code: output.code, drvPath: j.drvPath, message: printable(output.msg)}
	case errors.As(err, &build):
		return b.failedBuilder(f, a, build, ran)
	case errors.As(err, &spec):
		return &ending{status: reuse.ClientError, code: nixproto.InputRejected, drvPath: j.drvPath,
			message: fmt.Sprintf("cannot build '%s': %s", j.drvPath, printable(spec.Message))}
	}
	return b.broken(j, "run the build", err)
}

// failedBuilder is the end of a run whose builder failed.
func (b *Builds) failedBuilder(f *flight, a *attempt, err *vm.BuildError, ran time.Duration) *ending {
	j := a.job
	end := &ending{status: reuse.BuildFailed, code: nixproto.PermanentFailure, drvPath: j.drvPath, result: err.Result, crashed: crashed(err)}
	switch err.Kind {
	case vm.TimedOut:
		end.status, end.code = reuse.Timeout, nixproto.TimedOut
		end.message = timedOut(j.drvPath, a.limits)
		end.kind, end.after = store.TimeoutRun, ran
	case vm.Silent:
		end.status, end.code = reuse.Timeout, nixproto.TimedOut
		end.message = timedOutSilent(j.drvPath, a.limits)
		end.kind, end.after = store.TimeoutSilent, a.limits.MaxSilent
	case vm.LogLimit:
		end.status, end.code = reuse.LogLimit, nixproto.LogLimitExceeded
		end.message = logTooLong(j.drvPath, a.limits)
	case vm.OutOfMemory, vm.NoSpace, vm.ProcessLimit:
		end.status, end.short = reuse.MaxMemoryExceeded, err.Kind
		end.code = nixproto.MiscFailure
		end.message = fmt.Sprintf("builder for '%s' failed: %s", j.drvPath, printable(err.Message))
		if memory, disk, _ := a.more(end, b.ceiling(f), b.cfg.MaxScratchMiB); memory > a.memoryMiB || disk > a.diskMiB {
			end.status = reuse.OutOfMemory
		}
	case vm.OutputMissing, vm.OutputRefused:
		end.code = nixproto.OutputRejected
		end.message = printable(err.Message)
	default:
		if fixedOutput(j.drv) { // as Nix has it: what it fetches may be there tomorrow
			end.code = nixproto.TransientFailure
		}
		end.message = builderFailed(j.drvPath, err, a.log.tail.Lines())
	}
	return end
}

// cancelled is the end of a flight whose context ended.
func (b *Builds) cancelled(ctx context.Context, j *job) *ending {
	var limit *limitReached
	var byHand *cancelled
	switch cause := context.Cause(ctx); {
	case errors.As(cause, &limit):
		return limit.ending()
	case errors.As(cause, &byHand):
		return byHand.ending(j.drvPath)
	case errors.Is(cause, reuse.ErrAbandoned):
		return &ending{status: reuse.ClientDisconnect, code: nixproto.MiscFailure, drvPath: j.drvPath, message: abandoned(j)}
	}
	return shuttingDown(j)
}

func abandoned(j *job) string {
	return "the client went away before '" + string(j.drvPath) + "' was built"
}

// crashed reports whether a builder died, or the shell that ran it says that
// something died, by a signal that an emulated processor may have caused.
func crashed(err *vm.BuildError) bool {
	signals := []int{int(syscall.SIGSEGV), int(syscall.SIGILL), int(syscall.SIGBUS)}
	return slices.Contains(signals, err.Signal) || slices.Contains(signals, err.ExitStatus-128)
}

// broken is the end of a run that our own machinery spoiled. What went wrong is
// for the operator; the client is told that it is not the builder's fault.
func (b *Builds) broken(j *job, what string, err error) *ending {
	b.cfg.Logger.Error("build broke", "account", j.account, "drv", j.drvPath, "while", what, "error", err)
	var missing *vm.MissingError
	end := &ending{status: reuse.InternalError, code: nixproto.TransientFailure, drvPath: j.drvPath,
		message: fmt.Sprintf("the server could not build '%s': an internal error, not the builder's fault", j.drvPath)}
	switch {
	case errors.As(err, &missing):
		end.message = fmt.Sprintf("the server could not build '%s': %s", j.drvPath, printable(missing.What))
	case errors.Is(err, store.ErrNoSpace):
		end.hopeless = true
		end.message = fmt.Sprintf("the server could not build '%s': it has no space left on its disk", j.drvPath)
	}
	return end
}

// builderFailed is the message about a builder that failed by itself, with the
// end of its log.
func builderFailed(drv nixproto.StorePath, err *vm.BuildError, tail []string) string {
	var text strings.Builder
	fmt.Fprintf(&text, "builder for '%s' ", drv)
	switch {
	case err.Signal != 0:
		fmt.Fprintf(&text, "failed due to signal %d (%s)", err.Signal, signalName(err.Signal))
	case err.ExitStatus != 0:
		fmt.Fprintf(&text, "failed with exit code %d", err.ExitStatus)
	default:
		fmt.Fprintf(&text, "failed: %s", printable(err.Message))
	}
	if n := len(tail); n == 1 {
		text.WriteString(";\nlast log line:")
	} else if n > 1 {
		fmt.Fprintf(&text, ";\nlast %d log lines:", n)
	}
	for _, line := range tail {
		text.WriteString("\n> ")
		text.WriteString(printable(line))
	}
	return text.String()
}

// signalName is the description that strsignal gives to those signals of which
// builders die.
func signalName(n int) string {
	names := map[int]string{
		1: "Hangup", 2: "Interrupt", 3: "Quit", 4: "Illegal instruction", 5: "Trace/breakpoint trap", 6: "Aborted",
		7: "Bus error", 8: "Floating point exception", 9: "Killed", 10: "User defined signal 1", 11: "Segmentation fault",
		12: "User defined signal 2", 13: "Broken pipe", 14: "Alarm clock", 15: "Terminated", 24: "CPU time limit exceeded",
		25: "File size limit exceeded", 31: "Bad system call",
	}
	if name := names[n]; name != "" {
		return name
	}
	return "unknown signal"
}

func timedOut(drv nixproto.StorePath, l Limits) string {
	return fmt.Sprintf("building of '%s' timed out after %d seconds", drv, seconds(l.Timeout))
}

func timedOutSilent(drv nixproto.StorePath, l Limits) string {
	return fmt.Sprintf("building of '%s' timed out after %d seconds of silence", drv, seconds(l.MaxSilent))
}

func logTooLong(drv nixproto.StorePath, l Limits) string {
	return fmt.Sprintf("building of '%s' was killed after it wrote more than %d bytes of log output", drv, l.MaxLogSize)
}
