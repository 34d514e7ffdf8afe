package vm

import (
	"log/slog"
	"net"
)

// A SinkConfig says what a Sink takes.
type SinkConfig struct {
	// Outputs is the number of NARs that are expected; zero: nothing may be
	// written.
	Outputs int
	// Limit is how many bytes are taken at most, padding included.
	Limit int64
	// Create returns the receiver of the i-th NAR, from 0. The sink calls it
	// when the NAR's first byte arrives, and ends each receiver with Close when
	// its NAR is complete, or else with Abort.
	Create func(i int) (OutputWriter, error)
}

// A Sink is a disk of DiskSize bytes that can only be appended to.
type Sink struct{}

// NewSink returns an empty sink.
func NewSink(cfg SinkConfig) *Sink { return &Sink{} }

// Serve serves the sink on l, see Disk.Serve.
func (s *Sink) Serve(l net.Listener, log *slog.Logger) *NBDServer { return nil }

// Failed is closed when a write was refused or failed for the first time.
func (s *Sink) Failed() <-chan struct{} { return nil }

// Err returns why. It is a *SinkError or an *OutputError when the guest broke
// the rules, which is its build's loss; any other error is our machinery's.
func (s *Sink) Err() error { return nil }

// Sizes returns the sizes in bytes of the NARs that are complete.
func (s *Sink) Sizes() []int64 { return nil }

// Close aborts the receiver of an unfinished NAR and refuses further writes.
// Call it after the server is closed.
func (s *Sink) Close() {}

// A SinkError says how a guest broke the rules of the sink.
type SinkError struct{ Reason string }

func (e *SinkError) Error() string { return "output sink: " + e.Reason }
