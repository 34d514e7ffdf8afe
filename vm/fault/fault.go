// Package fault breaks builds on purpose, so that it can be seen from outside
// that the server bears what breaks. A Plan gives the first run that begins, of
// whatever build, its first fault, the second one the second, and so on. A nil
// Plan, which is what every server has that was not told otherwise, has none.
//
// The faults of guests are made by package vm. Those of stored inputs are made
// by who opens them: it learns from the context (From) what the run meets.
package fault

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// A Fault is one thing that goes wrong in one run of a build.
type Fault string

// The faults. None is a run that nothing happens to.
const (
	None Fault = "none"

	// BlobMissing: an input cannot be opened.
	BlobMissing Fault = "blob-missing"
	// BlobError: reads of inputs end in an input/output error.
	BlobError Fault = "blob-error"
	// BlobShort: inputs end early.
	BlobShort Fault = "blob-short"
	// BlobWrong: reads of inputs give other bytes than were stored.
	BlobWrong Fault = "blob-wrong"
	// SlowDisk: reads of inputs and writes of outputs take long.
	SlowDisk Fault = "slow-disk"

	// QEMUStart: QEMU is killed before the builder runs.
	QEMUStart Fault = "qemu-start"
	// QEMURun: QEMU is killed while the builder runs.
	QEMURun Fault = "qemu-run"
	// QEMUSend: QEMU is killed while it sends outputs.
	QEMUSend Fault = "qemu-send"
	// QEMUStop: QEMU stops running while the builder runs.
	QEMUStop Fault = "qemu-stop"
	// AgentSilent: nothing that the guest's agent says after the builder began
	// is heard.
	AgentSilent Fault = "agent-silent"
	// DiskFull: outputs cannot be stored.
	DiskFull Fault = "disk-full"

	// RootBuilder: the builder runs as root beside the guest's agent, outside the
	// sandbox, with a static busybox as its program.
	RootBuilder Fault = "root-builder"
)

var all = []Fault{None, BlobMissing, BlobError, BlobShort, BlobWrong, SlowDisk,
	QEMUStart, QEMURun, QEMUSend, QEMUStop, AgentSilent, DiskFull, RootBuilder}

// A Plan is the faults of the runs to come. It is safe for concurrent use.
type Plan struct {
	text string

	mu   sync.Mutex // guards what follows
	left []step
}

// A step is one fault of the next n runs; negative: of all.
type step struct {
	fault Fault
	n     int
}

// maxRepeat bounds the number behind a fault.
const maxRepeat = 1 << 20

// Parse reads a list of faults with commas between them. A number behind a
// fault, as in qemu-run*3, has it happen to that many runs; a * alone, at the
// end of the list, to all that follow. The empty list is a nil Plan.
func Parse(list string) (*Plan, error) {
	if list == "" {
		return nil, nil
	}
	p := &Plan{text: list}
	words := strings.Split(list, ",")
	for i, word := range words {
		name, times, repeated := strings.Cut(word, "*")
		s := step{Fault(name), 1}
		switch n, err := strconv.Atoi(times); {
		case !slices.Contains(all, s.fault):
			return nil, fmt.Errorf("there is no fault %.40q, only %q", name, all)
		case repeated && times == "" && i == len(words)-1:
			s.n = -1
		case repeated && (err != nil || n < 1 || n > maxRepeat):
			return nil, fmt.Errorf("bad number of runs in %.40q", word)
		case repeated:
			s.n = n
		}
		p.left = append(p.left, s)
	}
	return p, nil
}

// String returns the list as it was written.
func (p *Plan) String() string { return p.text }

// Next returns the fault of the run that begins now.
func (p *Plan) Next() Fault {
	if p == nil {
		return None
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.left) == 0 {
		return None
	}
	s := &p.left[0]
	if s.n--; s.n == 0 {
		p.left = p.left[1:]
	}
	return s.fault
}

type key struct{}

// With returns a context of a run that f happens to.
func With(ctx context.Context, f Fault) context.Context {
	if f == None {
		return ctx
	}
	return context.WithValue(ctx, key{}, f)
}

// From returns what happens to the run of a context.
func From(ctx context.Context) Fault {
	if f, ok := ctx.Value(key{}).(Fault); ok {
		return f
	}
	return None
}

// ErrMissing is the error of BlobMissing.
var ErrMissing = errors.New("it is missing (a fault that was asked for)")

// slow is how long a read or write of a slow disk takes.
const slow = 20 * time.Millisecond

// Open returns the error with which an input is opened.
func (f Fault) Open() error {
	if f == BlobMissing {
		return ErrMissing
	}
	return nil
}

// Read returns what is to be done with bytes that were read of a stored input;
// nil if nothing.
func (f Fault) Read() func(read []byte) error {
	switch f {
	case BlobError:
		return func([]byte) error { return syscall.EIO }
	case BlobShort:
		return func([]byte) error { return errors.New("it ends early (a fault that was asked for)") }
	case BlobWrong:
		return func(p []byte) error {
			if len(p) > 0 {
				p[len(p)/2] ^= 0x10
			}
			return nil
		}
	case SlowDisk:
		return func([]byte) error { time.Sleep(slow); return nil }
	}
	return nil
}

// Write returns the error with which bytes of an output are stored.
func (f Fault) Write() error {
	switch f {
	case DiskFull:
		return syscall.ENOSPC
	case SlowDisk:
		time.Sleep(slow)
	}
	return nil
}

// Hasty reports whether the run is not to wait as long as an emulated guest may
// take: it is known to be dead.
func (f Fault) Hasty() bool { return f == QEMUStop || f == AgentSilent }
