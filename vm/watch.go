package vm

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// Times that a guest gets beside the limits of its Spec, with hardware.
const (
	startPatience  = 60 * time.Second // from order to started
	outputPatience = 60 * time.Second // without progress, after the builder ended
	outputTotal    = 10 * time.Minute // for all outputs, and outputPerMiB for each MiB that has arrived
	outputPerMiB   = time.Second
	logPatience    = 20 * time.Second // for the rest of the log, after the result
)

// A phase is where a build stands.
type phase int

const (
	phaseOrdered phase = iota // the guest prepares
	phaseRunning              // the builder runs
	phaseSending              // the builder has ended, outputs arrive
)

// A watch knows how long each thing may take and says when one took too long.
// It belongs to one goroutine and looks at no clock.
type watch struct {
	accel              string
	timeout, maxSilent time.Duration // zero: none

	phase   phase
	entered time.Time // into the phase
	beat    time.Time // last sign of life on the control port
	active  time.Time // last byte of log while running, or of outputs while sending
	arrived int64     // bytes of outputs
}

func newWatch(accel string, spec *Spec, now time.Time) *watch {
	return &watch{accel: accel, timeout: spec.Timeout, maxSilent: spec.MaxSilent, entered: now, beat: now, active: now}
}

// enter starts a phase. Phases do not go back.
func (w *watch) enter(p phase, now time.Time) {
	if p > w.phase {
		w.phase, w.entered, w.active = p, now, now
	}
}

// A limit is a point in time and what it means that it was reached.
type limit struct {
	at  time.Time
	err error
}

// limits returns what applies now.
func (w *watch) limits() []limit {
	all := []limit{{w.beat.Add(patience(w.accel, beatPatience)), errors.New("the guest gives no sign of life")}}
	switch w.phase {
	case phaseOrdered:
		all = append(all, limit{w.entered.Add(patience(w.accel, startPatience)), errors.New("the guest did not start the builder in time")})
	case phaseRunning:
		if w.timeout > 0 {
			all = append(all, limit{w.entered.Add(w.timeout), &BuildError{Kind: TimedOut,
				Message: fmt.Sprintf("timed out after %d seconds", int(w.timeout.Seconds()))}})
		}
		if w.maxSilent > 0 {
			all = append(all, limit{w.active.Add(w.maxSilent), &BuildError{Kind: Silent,
				Message: fmt.Sprintf("timed out after %d seconds of silence", int(w.maxSilent.Seconds()))}})
		}
	case phaseSending:
		all = append(all, limit{w.active.Add(patience(w.accel, outputPatience)), errors.New("the outputs of the build did not arrive in time")})
		inTotal := outputTotal + time.Duration(w.arrived>>20)*outputPerMiB
		all = append(all, limit{w.entered.Add(patience(w.accel, inTotal)), errors.New("the outputs of the build arrive too slowly")})
	}
	return all
}

// next returns the limit that is reached first.
func (w *watch) next() limit {
	all := w.limits()
	first := all[0]
	for _, l := range all[1:] {
		if l.at.Before(first.at) {
			first = l
		}
	}
	return first
}

// activity is when bytes came last, and how many in all, shared between
// goroutines.
type activity struct {
	mu    sync.Mutex // guards what follows
	last  time.Time
	bytes int64
}

// mark says that n bytes came now.
func (a *activity) mark(n int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.last = time.Now()
	a.bytes += int64(n)
}

func (a *activity) get() (last time.Time, bytes int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.last, a.bytes
}

// later returns the later of two times.
func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// errLogLimit ends a log that is too long.
var errLogLimit = errors.New("log limit")

// A logPump copies a build's log from the guest until its connection ends, or
// the log is too long, or its writer fails.
type logPump struct {
	activity
	limit int64 // zero: none

	mu     sync.Mutex // guards what is below
	copied int64
	err    error
	moved  chan struct{} // closed at the next change

	done chan struct{} // closed when the pump has ended
}

func startLogPump(from net.Conn, to io.Writer, limit int64) *logPump {
	p := &logPump{limit: limit, moved: newDone(), done: newDone()}
	p.mark(0)
	go p.run(from, to)
	return p
}

func (p *logPump) run(from io.Reader, to io.Writer) {
	defer close(p.done)
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			p.mark(n)
			if werr := p.write(to, buf[:n]); werr != nil {
				err = werr
			}
		}
		if err != nil {
			if !errors.Is(err, errLogLimit) && !isWriteError(err) {
				err = io.EOF // the guest's end is told by others
			}
			p.advance(0, err)
			return
		}
	}
}

// A logWriteError says that the log could not be kept.
type logWriteError struct{ err error }

func (e *logWriteError) Error() string { return "write build log: " + e.err.Error() }
func (e *logWriteError) Unwrap() error { return e.err }

func isWriteError(err error) bool {
	var w *logWriteError
	return errors.As(err, &w)
}

// write passes on as much as the limit allows.
func (p *logPump) write(to io.Writer, b []byte) error {
	var over error
	if p.limit > 0 && p.copied+int64(len(b)) > p.limit {
		b, over = b[:p.limit-p.copied], errLogLimit
	}
	if _, err := to.Write(b); err != nil {
		return &logWriteError{err}
	}
	p.advance(int64(len(b)), nil)
	return over
}

// advance tells waiters that there is more, or an end.
func (p *logPump) advance(n int64, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.copied += n
	p.err = err
	close(p.moved)
	p.moved = newDone()
}

// state returns how much was copied, how the pump ended (nil: it has not), and
// a channel that is closed when either changes.
func (p *logPump) state() (copied int64, err error, changed <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.copied, p.err, p.moved
}
