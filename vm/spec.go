package vm

import (
	"context"
	"fmt"
	"io"
	"time"

	"nbd/nixproto"
	"nbd/nixproto/nar"
	"nbd/vm/usernet"
)

// A Spec is one build as data: everything a guest needs to run it and nothing
// of accounts, keys or connections. It is read only while Run runs.
type Spec struct {
	// BuildID names the build in logs and in the names of files and cgroups;
	// it must be unique among running builds and match [0-9A-Za-z-]+.
	BuildID string
	// DrvPath is the derivation's store path, for messages; may be "".
	DrvPath nixproto.StorePath
	// Drv is resolved: it has no InputDrvs.
	Drv *nixproto.Derivation
	// Inputs is the whole closure of the inputs; each NarHash is opened through
	// Config.Blobs.
	Inputs []nixproto.PathInfo
	// Outputs in the order in which the guest sends them.
	Outputs []Output
	// Network is what the build reaches; nil is nothing. Only a fixed output may
	// have one.
	Network *usernet.Config
	// Cores is the number of CPUs that the build may use, at least 1.
	Cores int
	// MemoryMiB is the most memory the build's cgroup may use, page cache
	// included; what a guest takes beside it is in MemoryCostMiB.
	MemoryMiB int
	// ScratchMiB is the size of the writable disk; zero means DefaultScratchMiB.
	ScratchMiB int
	// Timeout bounds the builder's run time; zero means no limit.
	Timeout time.Duration
	// MaxSilent bounds the time without log output; zero means no limit.
	MaxSilent time.Duration
	// MaxLog bounds the bytes of the log; zero means no limit.
	MaxLog int64
}

// An Output is one output of a Spec.
type Output struct {
	Name string
	// Path is where the builder writes it: the final path, or the scratch path
	// of a floating content-addressed output.
	Path nixproto.StorePath
}

// Blobs opens the contents of inputs. Implementations are safe for concurrent
// use. A missing or damaged blob is an error of our machinery, never of the
// build.
type Blobs interface {
	// Open returns the NAR with the given hash. The caller closes it; until
	// then its bytes do not change or vanish.
	Open(ctx context.Context, narHash nixproto.Hash) (Blob, error)
}

// A Blob is one stored NAR, open for reading at any offset, from several
// goroutines at once.
type Blob interface {
	io.ReaderAt
	io.Closer
	// Size is the length of the NAR in bytes.
	Size() int64
	// Index lists the files of the NAR with their places in it.
	Index() (nar.Index, error)
}

// Outputs takes the NARs of a build's outputs as they leave the guest.
type Outputs interface {
	// Create starts the NAR of the named output. Run creates one at a time, in
	// the order of Spec.Outputs, and ends each with Close or Abort.
	Create(ctx context.Context, name string) (OutputWriter, error)
}

// An OutputWriter receives one NAR. A write that fails with an *OutputError
// says that the bytes are not a NAR that may be stored: the build's fault. Any
// other error is our machinery's.
type OutputWriter interface {
	io.Writer
	// Close says that the whole NAR was written, and verifies it.
	Close() error
	// Abort drops what was written. It is called instead of Close.
	Abort()
}

// An OutputError is returned by an OutputWriter for a malformed NAR. The guest
// is not trusted: its agent makes well-formed ones, so a build that causes this
// error took over its guest, or met a defect.
type OutputError struct{ Err error }

func (e *OutputError) Error() string { return "output refused: " + e.Err.Error() }
func (e *OutputError) Unwrap() error { return e.Err }

// A Result tells of a build whose builder exited with status 0 and whose
// outputs all arrived; or, beside an error, what is known of one that ended
// otherwise.
type Result struct {
	// Booted is when the guest first answered, Start when the builder ran its
	// first instruction, Stop when it had ended; all on the host's clock.
	Booted, Start, Stop time.Time
	// CPUUser and CPUSystem are what the builder's cgroup used, in guest time.
	CPUUser, CPUSystem time.Duration
	// PeakMemory and PeakScratch are the most that was in use at one time, in
	// bytes; zero if unknown. Memory is counted with the page cache that the build
	// filled, which the kernel takes back before it runs out.
	PeakMemory, PeakScratch int64
	// Produced are the names of the outputs that were delivered, in order.
	Produced []string
	// Network is what a build with a network did with it.
	Network *usernet.Use
	// Restored reports that the guest came from a template, not a cold boot.
	Restored bool
}

// A Kind says how a build failed.
type Kind int

// The kinds of failure. The product's table of ends tells which of them are
// kept and which are retried.
const (
	// Failed: the builder exited with a status other than 0 or by a signal.
	Failed Kind = iota + 1
	// TimedOut: Spec.Timeout passed.
	TimedOut
	// Silent: Spec.MaxSilent passed without output.
	Silent
	// LogLimit: more than Spec.MaxLog bytes of log.
	LogLimit
	// OutOfMemory: the guest killed a process of the build for lack of memory,
	// whatever the builder's exit status was.
	OutOfMemory
	// NoSpace: the scratch disk was full, whatever the exit status was.
	NoSpace
	// ProcessLimit: the build met its limit of processes, whatever the exit
	// status was.
	ProcessLimit
	// OutputMissing: the builder succeeded and did not make all outputs.
	OutputMissing
	// OutputRefused: an output holds what cannot be stored, for example a
	// socket or more bytes than Config.MaxOutput.
	OutputRefused
)

var kindNames = [...]string{"", "failed", "timed out", "silent", "log limit", "out of memory",
	"no space", "process limit", "output missing", "output refused"}

// String returns the kind in words.
func (k Kind) String() string {
	if k < 1 || int(k) >= len(kindNames) {
		return fmt.Sprintf("kind %d", int(k))
	}
	return kindNames[k]
}

// A BuildError says that the build failed, and our machinery did not. Any other
// error of Run is transient: the build may be tried again and nothing is
// recorded of it.
type BuildError struct {
	Kind Kind
	// ExitStatus and Signal are how the builder ended, if it did.
	ExitStatus, Signal int
	// Message is one sentence for the client, without host paths.
	Message string
	// Result tells of the run; Produced is empty.
	Result Result
}

func (e *BuildError) Error() string { return e.Message }
