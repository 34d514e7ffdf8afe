package server

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"strings"
	"time"

	"nbd/nixproto"
	"nbd/reuse"
	"nbd/store"
	"nbd/vm"
)

// The life of a flight, from its start to its end, is in this file; wait.go is
// the other side of it. A flight makes attempts until one ends in a way that
// another attempt would not change.
//
//	record (pending) ─▶ queue ─▶ record (running), log ─▶ guest ─▶ outputs ─▶ record (end)
//	      ▲                                                 │
//	      └────── transient, or more memory may help ◀──────┘

type (
	flight = reuse.Flight[*request, flightEvent, *ending]
	waiter = reuse.Waiter[*request, flightEvent, *ending]
)

// A flightEvent is what a flight tells those who wait for it; one field is set.
type flightEvent struct {
	place   string   // it waits in the queue, there
	attempt *attempt // it runs, and has a log
	note    string   // a line for the client, outside the log
}

// An ending is how a flight ended. It does not change.
type ending struct {
	status  reuse.Status
	code    nixproto.BuildStatus
	message string // for the client; empty on success
	// hopeless says that the same would happen again at once.
	hopeless bool
	// limits are those that it ran under.
	limits Limits
	// paths are those of all outputs, after a success.
	paths map[string]nixproto.StorePath
	// result tells of the run; zero if none came so far.
	result vm.Result
}

// answer is the result for a client that asked for j.
func (e *ending) answer(j *job) *nixproto.BuildResult {
	r := &nixproto.BuildResult{Status: e.code, Error: e.message}
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

// otherLimit reports whether the run ended by a limit that l does not have.
func (e *ending) otherLimit(l Limits) bool {
	switch e.status {
	case reuse.Timeout:
		return stricter(e.limits.Timeout, l.Timeout) || stricter(e.limits.MaxSilent, l.MaxSilent)
	case reuse.LogLimit:
		return stricter(e.limits.MaxLogSize, l.MaxLogSize)
	}
	return false
}

// run is the goroutine of a flight.
func (b *Builds) run(f *flight, j *job, in *jobInputs) *ending {
	lease := b.store.NewLease(j.account)
	defer lease.Release()
	lease.Add(j.drv.InputSrcs...)
	lease.Add(staticOutputs(j.drv)...)

	a := &attempt{limits: j.limits, memoryMiB: b.cfg.MemoryMiB}
	for transient := 0; ; {
		end := b.attempt(f, j, in, lease, a)
		if !end.status.Retried() || end.hopeless || f.Context().Err() != nil {
			return end
		}
		next := &attempt{limits: j.limits, memoryMiB: a.memoryMiB, before: a.record}
		if end.status == reuse.OutOfMemory {
			next.memoryMiB = min(2*a.memoryMiB, b.cfg.MaxMemoryMiB)
			f.Tell(flightEvent{note: fmt.Sprintf("%s; trying again with %d MiB", end.message, next.memoryMiB)})
		} else {
			if transient++; transient > b.cfg.Retries {
				return end
			}
			f.Tell(flightEvent{note: fmt.Sprintf("%s; trying again (%d of %d)", end.message, transient, b.cfg.Retries)})
		}
		a = next
	}
}

// An attempt is one run of a flight's build.
type attempt struct {
	limits    Limits
	memoryMiB int
	before    *store.Build // record of the attempt that this one repeats; nil if it is the first
	record    *store.Build
	log       *runLog
}

// attempt makes one attempt and leaves a record of it.
func (b *Builds) attempt(f *flight, j *job, in *jobInputs, lease *store.Lease, a *attempt) *ending {
	ctx := f.Context()
	if err := b.newRecord(ctx, j, in, a); err != nil {
		return b.broken(j, "record the build", err)
	}
	release, err := b.queue.acquire(ctx, j.account, b.need(a), func(p queuePlace) {
		f.Tell(flightEvent{place: p.String()})
	})
	var end *ending
	var outputs []store.BuildOutput
	if err != nil {
		end = b.unqueued(ctx, j, err)
	} else {
		end, outputs = b.runGuest(f, j, in, lease, a)
		release()
	}
	end.limits = a.limits
	if err := b.endRecord(a, end, outputs); err != nil {
		return b.broken(j, "record the build", err)
	}
	b.cfg.Logger.Info("build ended", "build", a.record.ID, "account", j.account, "drv", j.drvPath,
		"status", end.status, "time", a.record.Stopped.Sub(a.record.Created).Round(time.Millisecond), "error", a.record.Error)
	return end
}

// need is what the guest of an attempt takes of the machine.
func (b *Builds) need(a *attempt) Room {
	return Room{MemoryMiB: vm.MemoryCostMiB(a.memoryMiB), CPUs: b.cfg.CPUs}
}

// unqueued is the end of a build that never got its turn.
func (b *Builds) unqueued(ctx context.Context, j *job, err error) *ending {
	var large *errTooLarge
	if errors.As(err, &large) {
		return &ending{status: reuse.ClientError, code: nixproto.MiscFailure, message: fmt.Sprintf("cannot build '%s': %v", j.drvPath, err)}
	}
	return b.cancelled(ctx, j)
}

// runGuest runs the builder, registers its outputs and says how that ended. A
// defect of ours that panics ends this build alone.
func (b *Builds) runGuest(f *flight, j *job, in *jobInputs, lease *store.Lease, a *attempt) (end *ending, outputs []store.BuildOutput) {
	defer func() {
		if p := recover(); p != nil {
			end = b.broken(j, "build", fmt.Errorf("panic: %v\n%s", p, debug.Stack()))
		}
	}()
	ctx := f.Context()
	if err := b.startRecord(ctx, a); err != nil {
		return b.broken(j, "record the build", err), nil
	}
	file, err := b.store.CreateBuildLog(ctx, a.record.ID)
	if err != nil {
		return b.broken(j, "create the log", err), nil
	}
	a.log = newRunLog(file, time.Now())
	defer a.log.Close() // it is closed below; here after a panic
	if b.cfg.Runner.Status().Accel == "tcg" {
		f.Tell(flightEvent{note: fmt.Sprintf("'%s' is built in an emulated machine (TCG), because this server has no KVM: it takes many times as long", j.drvPath)})
	}
	f.Tell(flightEvent{attempt: a})

	produced, err := b.newProduced(j, in)
	if err != nil {
		return b.broken(j, "prepare outputs", err), nil
	}
	defer produced.discard()
	result, err := b.cfg.Runner.Run(ctx, produced.spec(b, j, in, a), a.log, produced)
	// Compressing the log takes as long as registering outputs does. Those who
	// follow it come to its end at once.
	closed := make(chan error, 1)
	go func() { closed <- a.log.Close() }()
	var paths map[string]nixproto.StorePath
	if err == nil {
		outputs, paths, err = b.finish(ctx, j, in, lease, a, produced)
	}
	if logErr := <-closed; logErr != nil {
		// What the builder made is right without its log.
		b.cfg.Logger.Error("cannot keep the log of a build", "build", a.record.ID, "err", logErr)
	}
	if err != nil {
		end = b.failedRun(ctx, j, a, err)
		if result != nil {
			end.result = *result
		}
		return end, nil
	}
	return &ending{status: reuse.Built, code: nixproto.Built, paths: paths, result: *result}, outputs
}

// failedRun is the end of a run that brought no outputs.
func (b *Builds) failedRun(ctx context.Context, j *job, a *attempt, err error) *ending {
	var build *vm.BuildError
	var output *outputError
	var spec *vm.SpecError
	switch {
	case ctx.Err() != nil:
		return b.cancelled(ctx, j)
	case errors.As(err, &output):
		return &ending{status: reuse.BuildFailed, code: output.code, message: printable(output.msg)}
	case errors.As(err, &build):
		return b.failedBuilder(j, a, build)
	case errors.As(err, &spec):
		return &ending{status: reuse.ClientError, code: nixproto.InputRejected,
			message: fmt.Sprintf("cannot build '%s': %s", j.drvPath, printable(spec.Message))}
	}
	return b.broken(j, "run the build", err)
}

// failedBuilder is the end of a run whose builder failed.
func (b *Builds) failedBuilder(j *job, a *attempt, err *vm.BuildError) *ending {
	end := &ending{status: reuse.BuildFailed, code: nixproto.PermanentFailure, result: err.Result}
	switch err.Kind {
	case vm.TimedOut:
		end.status, end.code = reuse.Timeout, nixproto.TimedOut
		end.message = timedOut(j.drvPath, a.limits)
	case vm.Silent:
		end.status, end.code = reuse.Timeout, nixproto.TimedOut
		end.message = timedOutSilent(j.drvPath, a.limits)
	case vm.LogLimit:
		end.status, end.code = reuse.LogLimit, nixproto.LogLimitExceeded
		end.message = logTooLong(j.drvPath, a.limits)
	case vm.OutOfMemory, vm.NoSpace, vm.ProcessLimit:
		end.status = reuse.OutOfMemory
		end.code = nixproto.MiscFailure
		end.message = fmt.Sprintf("builder for '%s' failed: %s", j.drvPath, printable(err.Message))
		if err.Kind != vm.OutOfMemory || a.memoryMiB >= b.cfg.MaxMemoryMiB {
			end.status = reuse.MaxMemoryExceeded // more memory would not help
		}
	case vm.OutputMissing, vm.OutputRefused:
		end.code = nixproto.OutputRejected
		end.message = printable(err.Message)
	default:
		end.message = builderFailed(j.drvPath, err, a.log.tail.Lines())
	}
	return end
}

// cancelled is the end of a flight whose context ended.
func (b *Builds) cancelled(ctx context.Context, j *job) *ending {
	var limit *limitReached
	switch cause := context.Cause(ctx); {
	case errors.As(cause, &limit):
		return limit.ending()
	case errors.Is(cause, reuse.ErrAbandoned):
		return &ending{status: reuse.ClientDisconnect, code: nixproto.MiscFailure, message: "nobody waited for '" + string(j.drvPath) + "' any more"}
	}
	return &ending{status: reuse.InternalError, code: nixproto.TransientFailure,
		message: fmt.Sprintf("cannot build '%s': %v", j.drvPath, reuse.ErrClosed)}
}

// broken is the end of a run that our own machinery spoiled. What went wrong is
// for the operator; the client is told that it is not the builder's fault.
func (b *Builds) broken(j *job, what string, err error) *ending {
	b.cfg.Logger.Error("build broke", "account", j.account, "drv", j.drvPath, "while", what, "error", err)
	var missing *vm.MissingError
	end := &ending{status: reuse.InternalError, code: nixproto.TransientFailure,
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
