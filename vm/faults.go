package vm

import (
	"context"
	"fmt"
	"sync/atomic"
	"syscall"

	"nbd/vm/fault"
	"nbd/vm/link"
)

// Faults that an operator asked for, to see what becomes of builds. All of them
// look like what breaks by itself: nothing else of this package knows of them.

// A faulty is what happens to one run.
type faulty struct {
	fault fault.Fault
	proc  atomic.Pointer[process] // QEMU, when it runs
}

// begin takes the next fault of the plan.
func (f *faulty) begin(ctx context.Context, r *Runner, order *link.BuildOrder, id string) context.Context {
	f.fault = r.cfg.Faults.Next()
	if f.fault == fault.None {
		return ctx
	}
	r.cfg.Logger.Warn("A FAULT THAT WAS ASKED FOR", "fault", string(f.fault), "build", id)
	order.Unconfined = f.fault == fault.RootBuilder
	return fault.With(ctx, f.fault)
}

// at kills or stops QEMU if the run has come to where that is to happen.
func (f *faulty) at(point ...fault.Fault) {
	for _, p := range point {
		if f.fault != p {
			continue
		}
		// An error says that it has ended by itself.
		if p == fault.QEMUStop {
			_ = f.proc.Load().cmd.Process.Signal(syscall.SIGSTOP)
		} else {
			f.proc.Load().kill()
		}
	}
}

// deaf reports whether a message of the guest is not to be heard.
func (f *faulty) deaf(m link.Message) bool {
	if f.fault != fault.AgentSilent {
		return false
	}
	_, first := m.(*link.Started)
	return !first
}

// output returns the receiver of an output.
func (f *faulty) output(w OutputWriter) OutputWriter {
	f.at(fault.QEMUSend)
	if f.fault == fault.DiskFull || f.fault == fault.SlowDisk {
		return &faultyWriter{w, f.fault}
	}
	return w
}

// accel is how patient the run is.
func (f *faulty) accel(accel string) string {
	if f.fault.Hasty() {
		return "kvm"
	}
	return accel
}

type faultyWriter struct {
	OutputWriter
	fault fault.Fault
}

func (w *faultyWriter) Write(p []byte) (int, error) {
	if err := w.fault.Write(); err != nil {
		return 0, fmt.Errorf("store output: %w (a fault that was asked for)", err)
	}
	return w.OutputWriter.Write(p)
}
