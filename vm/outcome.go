package vm

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"nbd/vm/link"
)

// This file decides whose failure an end was. See the package comment for the
// rule.

// blame looks for causes of an error that say more than the error: disks that
// failed, and memory that ran out on the host.
func (b *build) blame(err error) error {
	// Not even a success counts that was built of inputs that could not be read.
	if derr := b.disks.inputs.Err(); derr != nil {
		return derr
	}
	if err == nil {
		return nil
	}
	if serr := b.disks.sink.Err(); serr != nil {
		var broke *SinkError
		var bad *OutputError
		if errors.As(serr, &broke) || errors.As(serr, &bad) {
			return &BuildError{Kind: OutputRefused, Message: "the outputs were refused: " + serr.Error()}
		}
		return serr
	}
	var failed *BuildError
	if errors.As(err, &failed) {
		return err
	}
	panicked := strings.Contains(strings.Join(b.g.console.lines(20), "\n"), "System is deadlocked on memory")
	if panicked || b.g.group != nil && b.g.group.outOfMemory() {
		return &BuildError{Kind: OutOfMemory, Message: b.outOfMemory()}
	}
	return err
}

func (b *build) outOfMemory() string {
	return fmt.Sprintf("out of memory: the build was allowed %d MiB", b.spec.MemoryMiB)
}

// logFailure returns what an end of the log pump means for the build, nil if
// nothing.
func (b *build) logFailure(pumped error) error {
	if errors.Is(pumped, errLogLimit) {
		return &BuildError{Kind: LogLimit, Message: fmt.Sprintf("the build's log is longer than %d bytes", b.spec.MaxLog)}
	}
	if isWriteError(pumped) {
		return pumped
	}
	return nil
}

// late adds to a passed limit what QEMU says of the guest, if it is our failure.
func (b *build) late(err error) error {
	var failed *BuildError
	if errors.As(err, &failed) {
		return err
	}
	var status struct {
		Status string `json:"status"`
	}
	ctx, stop := context.WithTimeout(b.g.ctx, 5*time.Second)
	defer stop()
	if qerr := b.g.qmp.do(ctx, "query-status", nil, nil, &status); qerr != nil {
		return b.g.explain(fmt.Errorf("%w; %w", err, qerr))
	}
	return b.g.explain(fmt.Errorf("%w; QEMU says that it is %q", err, status.Status))
}

// event returns an error if what happened ends the guest.
func event(e qmpEvent) error {
	switch e.Name {
	case "GUEST_PANICKED":
		return errors.New("the guest's kernel panicked")
	case "BLOCK_IO_ERROR":
		if e.Data.NoSpace {
			return errHostDisk
		}
		// Disks that we serve tell by themselves, after this event.
	case "SHUTDOWN", "RESET":
		return fmt.Errorf("the guest ended by itself (%s)", e.Data.Reason)
	case "STOP":
		return errors.New("the guest stopped running")
	}
	return nil
}

// maxMessage is how many bytes of what an agent says are passed on: to logs,
// into records and to all who wait.
const maxMessage = 16 << 10

// judge returns the failure that a result tells of. A run that was starved, or
// whose disks failed, counts as that whatever its builder's exit status: it must
// not become a truth about the build.
func (b *build) judge(res *link.Result) error {
	message := res.Message
	if len(message) > maxMessage {
		message = strings.ToValidUTF8(message[:maxMessage], "") + "…"
	}
	switch {
	case res.Kind == link.Internal:
		return b.g.explain(errors.New("the guest's agent failed: " + message))
	case res.IOErrors:
		return b.g.explain(errors.New("a disk failed under the build"))
	case res.OOMKills > 0:
		return &BuildError{Kind: OutOfMemory, ExitStatus: res.ExitStatus, Signal: res.Signal, Message: b.outOfMemory()}
	case res.DiskFull:
		return &BuildError{Kind: NoSpace, ExitStatus: res.ExitStatus, Signal: res.Signal,
			Message: fmt.Sprintf("no space left: the build's disk has %d MiB", b.g.machine.scratchGiB<<10)}
	case res.ProcessLimit > 0:
		return &BuildError{Kind: ProcessLimit, ExitStatus: res.ExitStatus, Signal: res.Signal,
			Message: fmt.Sprintf("too many processes: the build is allowed %d", b.order.MaxProcesses)}
	}
	switch res.Kind {
	case link.OutputMissing:
		return &BuildError{Kind: OutputMissing, Message: message}
	case link.OutputRefused:
		return &BuildError{Kind: OutputRefused, Message: message}
	case link.Signaled:
		return &BuildError{Kind: Failed, Signal: res.Signal, Message: fmt.Sprintf("builder failed due to signal %d", res.Signal)}
	case link.Exited:
		if res.ExitStatus != 0 {
			return &BuildError{Kind: Failed, ExitStatus: res.ExitStatus, Message: fmt.Sprintf("builder failed with exit code %d", res.ExitStatus)}
		}
		return nil
	}
	return fmt.Errorf("the guest's agent told an unknown end %.40q", res.Kind)
}

// deliver checks that all outputs have arrived whole.
func (b *build) deliver(sent *link.Outputs) (*Result, error) {
	if sent == nil {
		return nil, errors.New("the guest's agent told of success without outputs")
	}
	if err := b.disks.sink.Err(); err != nil {
		return nil, err
	}
	sizes := b.disks.sink.Sizes()
	var told []int64
	for i, o := range sent.Outputs {
		if i >= len(b.spec.Outputs) || o.Name != b.spec.Outputs[i].Name {
			return nil, fmt.Errorf("the guest's agent told of an output %.80q that is not the build's", o.Name)
		}
		told = append(told, o.Size)
		b.result.Produced = append(b.result.Produced, o.Name)
	}
	if len(told) != len(b.spec.Outputs) || !slices.Equal(sizes, told) {
		return nil, fmt.Errorf("the outputs did not arrive whole: %d bytes of %d", sizes, told)
	}
	return &b.result, nil
}
