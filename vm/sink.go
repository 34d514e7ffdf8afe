package vm

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"

	"nbd/nixproto/nar"
	"nbd/vm/link"
)

// A SinkConfig says what a Sink takes.
type SinkConfig struct {
	// Outputs is the number of NARs that are expected; zero: nothing may be
	// written.
	Outputs int
	// Limit is how many bytes are taken at most, padding included.
	Limit int64
	// Create returns the receiver of the i-th NAR, from 0. The sink calls it
	// when the NAR's first bytes arrive, and ends each receiver with Close when
	// its NAR is complete, or else with Abort. No two of these calls, nor calls
	// of a receiver, run at once.
	Create func(i int) (OutputWriter, error)
}

// A Sink is a disk of DiskSize bytes that can only be appended to: a write has
// to begin where the last one ended, at first at 0. What is written are NARs,
// one after the other, each followed by zeros up to a multiple of
// link.OutputAlign. Reads give zeros; trims, flushes and writes of zeros change
// nothing: a write is answered when the receiver has taken its bytes.
//
// The guest is not trusted. Whoever breaks these rules gets an input/output
// error for this write and all that follow. Its methods are safe for
// concurrent use.
type Sink struct {
	cfg     SinkConfig
	failure failure

	// mu guards what follows, and is held while a receiver works.
	mu     sync.Mutex
	off    int64        // where the next write has to begin
	out    OutputWriter // of the NAR that is arriving; nil between NARs
	parser *nar.Parser  // of that NAR; it finds the end
	sizes  []int64      // of the NARs that are complete
	closed bool
}

// A SinkError says how a guest broke the rules of the sink.
type SinkError struct{ Reason string }

func (e *SinkError) Error() string { return "output disk: " + e.Reason }

// errSinkClosed is the error of writes after Close.
var errSinkClosed = errors.New("output disk is closed")

// NewSink returns an empty sink.
func NewSink(cfg SinkConfig) *Sink { return &Sink{cfg: cfg, failure: newFailure()} }

// Serve serves the sink to clients of the Network Block Device protocol that
// connect to l, until the server is closed. It takes over l. A nil logger
// discards.
func (s *Sink) Serve(l net.Listener, log *slog.Logger) *NBDServer { return serveNBD(l, s, log) }

// Failed is closed when a write was refused or failed for the first time.
func (s *Sink) Failed() <-chan struct{} { return s.failure.failed }

// Err returns why. It is a *SinkError or an *OutputError when the guest broke
// the rules, which is its build's loss, or else what Create or a receiver
// returned.
func (s *Sink) Err() error { return s.failure.get() }

// Sizes returns the sizes in bytes of the NARs that are complete, in the order
// in which they came.
func (s *Sink) Sizes() []int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.sizes)
}

// Close aborts the receiver of an unfinished NAR. Writes after it fail, which
// Err does not tell.
func (s *Sink) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.abortLocked()
}

func (s *Sink) abortLocked() {
	if s.out != nil {
		s.out.Abort()
		s.out, s.parser = nil, nil
	}
}

func (s *Sink) writable() bool { return true }

func (s *Sink) read(p []byte, off int64) error {
	clear(p)
	return nil
}

func (s *Sink) write(p []byte, off int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return errSinkClosed
	}
	if err := s.failure.get(); err != nil {
		return err
	}
	if err := s.takeLocked(p, off); err != nil {
		s.failure.set(err)
		s.abortLocked()
		return err
	}
	return nil
}

// takeLocked takes the bytes of a write.
func (s *Sink) takeLocked(p []byte, off int64) error {
	if off != s.off {
		return &SinkError{fmt.Sprintf("write at %d, expected at %d", off, s.off)}
	}
	if int64(len(p)) > s.cfg.Limit-s.off {
		return &SinkError{fmt.Sprintf("more than %d bytes of outputs", s.cfg.Limit)}
	}
	for len(p) > 0 {
		n, err := s.pieceLocked(p)
		if err != nil {
			return err
		}
		p = p[n:]
		s.off += int64(n)
	}
	return nil
}

// pieceLocked takes the first bytes of p: padding, or a part of a NAR.
func (s *Sink) pieceLocked(p []byte) (int, error) {
	if s.out == nil {
		if over := s.off % link.OutputAlign; over != 0 {
			return takePadding(p[:min(int64(len(p)), link.OutputAlign-over)])
		}
		if err := s.beginLocked(); err != nil {
			return 0, err
		}
	}
	n, bad := s.parser.Feed(p)
	// The receiver has its own opinion of the bytes before the bad one, and
	// says it in its own words.
	if _, err := s.out.Write(p[:n]); err != nil {
		return n, err
	}
	if bad != nil {
		return n, &OutputError{bad}
	}
	if !s.parser.Done() {
		return n, nil
	}
	out, size := s.out, s.parser.Size()
	s.out, s.parser = nil, nil
	if err := out.Close(); err != nil {
		return n, err
	}
	s.sizes = append(s.sizes, size)
	return n, nil
}

// beginLocked begins the next NAR.
func (s *Sink) beginLocked() error {
	if len(s.sizes) == s.cfg.Outputs {
		return &SinkError{fmt.Sprintf("more than the %d expected outputs", s.cfg.Outputs)}
	}
	out, err := s.cfg.Create(len(s.sizes))
	if err != nil {
		return err
	}
	s.out, s.parser = out, nar.NewParser(nar.Limits{EndOnly: true})
	return nil
}

// sinkZeros is what padding is compared with.
var sinkZeros [link.OutputAlign]byte

// takePadding takes p, which has to be zeros, at most link.OutputAlign.
func takePadding(p []byte) (int, error) {
	if !bytes.Equal(p, sinkZeros[:len(p)]) {
		return 0, &SinkError{"padding of an output is not zero"}
	}
	return len(p), nil
}
