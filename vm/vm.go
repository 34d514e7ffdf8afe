// Package vm runs one build in one QEMU guest of its own.
//
// # The life of a guest
//
//  1. New finds QEMU, a kernel, the shell of the sandbox and the program that
//     is the guest's init (nbd itself), and touches nothing else. What must be
//     found out by booting (does KVM work, is there a template of this size) is
//     found out on the first Run, once, and remembered in the state directory.
//  2. Run makes a directory for the guest, gives it a user id of its own, and
//     serves the inputs as one read-only disk and a sink for the outputs on
//     sockets in that directory. No bytes of the inputs are copied.
//  3. The guest starts as a clone of a template: a guest of the same shape that
//     booted once and was saved just after its agent said hello. The template's
//     memory is a sealed memfd that all its clones map privately. When that
//     fails the template is dropped and the guest boots from cold.
//  4. Clones wake as twins. The host sends entropy, the time and the number of
//     CPUs to bring up; the agent refuses work before.
//  5. The host sends the build order. The log arrives on a port of its own, the
//     outputs in the sink, and what became of the build on the control port.
//  6. QEMU is killed, never asked. Its directory, cgroup and user id go back.
//
// # Whose failure it was
//
// Only what the agent said on the control port, or a limit of the Spec that was
// passed, makes a *BuildError. A guest that dies, hangs, panics or ends its
// connection without a result is a failure of our machinery whatever QEMU's
// exit status (a panicked guest exits 0), and may be tried again.
package vm

import (
	"context"
	"errors"
	"io"
	"log/slog"
)

// Generation counts the changes to the sandbox that can make the same builder
// end differently. Raise it by hand with such a change.
const Generation = 1

// DefaultScratchMiB is the size of the scratch disk when a Spec names none.
const DefaultScratchMiB = 50 << 10

// Config says where things are. The zero value of each field but StateDir and
// Blobs works.
type Config struct {
	// StateDir holds imported kernels and what was learned by booting. Required.
	StateDir string
	// RuntimeDir holds the directories of running guests, with their sockets
	// and scratch disks; default StateDir/guests.
	RuntimeDir string
	// Blobs opens the inputs. Required by Run.
	Blobs Blobs
	// QEMU is the path of qemu-system-x86_64; default: searched in PATH.
	QEMU string
	// Kernel is the path of a kernel image, the name of an imported kernel, or
	// "": the newest imported one, else the host's.
	Kernel string
	// Accel is "kvm", "tcg", or "auto" (default): KVM if a guest really boots
	// with it.
	Accel string
	// Busybox is the static shell that a build sees as /bin/sh; default:
	// searched where distributions keep it.
	Busybox string
	// Binary is the program that becomes the guest's /init; default: the
	// running program.
	Binary string
	// FirstUID is the first of UIDs user ids (and group ids) that guests run
	// under when the server is root; default 64000, 256 ids.
	FirstUID, UIDs int
	// MaxOutput bounds the bytes of all outputs of one build; default 64 GiB.
	MaxOutput int64
	// ColdBoot turns templates off.
	ColdBoot bool
	// Logger takes what an operator acts on; default: discarded.
	Logger *slog.Logger
}

// A MissingError says that something nbd needs is not on this machine. Its text
// names the thing and how to get it.
type MissingError struct{ What, Hint string }

func (e *MissingError) Error() string { return e.What + " (" + e.Hint + ")" }

// ErrClosed is returned by a Runner after Close.
var ErrClosed = errors.New("runner is closed")

// A Status tells what guests run on. Its JSON form is part of `nbd admin
// status --json`.
type Status struct {
	// Accel is "kvm" or "tcg", "" while that is not known yet.
	Accel string `json:"accel"`
	// WhyNotKVM is empty under KVM.
	WhyNotKVM string `json:"whyNotKvm,omitempty"`
	// QEMU and Kernel are versions, for people.
	QEMU   string `json:"qemu"`
	Kernel string `json:"kernel"`
	// KernelPath, QEMUPath and Busybox are host paths.
	KernelPath string `json:"kernelPath"`
	QEMUPath   string `json:"qemuPath"`
	Busybox    string `json:"busybox"`
	// CPU is the model that guests see.
	CPU string `json:"cpu"`
	// Generation identifies the sandbox: equal generations end a failing
	// builder alike.
	Generation string `json:"generation"`
	// Weaknesses are sentences on what protects less than it could, and on
	// pairs of versions that are known to be bad.
	Weaknesses []string `json:"weaknesses,omitempty"`
	// Templates is the number of templates in memory.
	Templates int `json:"templates"`
	// Guests is the number of guests alive now.
	Guests int `json:"guests"`
}

// A Runner runs builds. Its methods are safe for concurrent use.
type Runner struct {
	cfg Config
}

// New checks cfg and finds what guests need. Missing things are *MissingError.
// It boots nothing.
func New(cfg Config) (*Runner, error) { return &Runner{cfg: cfg}, nil }

// Close kills all guests, waits for their Runs and frees the templates.
func (r *Runner) Close() error { return nil }

// Run runs spec's build in a new guest and returns when nothing of the guest
// is left. A build that failed is a *BuildError; any other error is transient.
// Log lines go to log as they come, in the calling goroutine's stead: log must
// not block for long, it holds up the builder. Outputs arrive in outs before
// Run returns; after an error the caller drops them.
//
// When ctx ends the guest is killed at once and Run returns ctx's error.
func (r *Runner) Run(ctx context.Context, spec *Spec, log io.Writer, outs Outputs) (*Result, error) {
	return nil, errors.New("run build: not yet")
}

// MemoryCostMiB is what a build with that much memory may take of the host's:
// the build, the guest's kernel and agent, and QEMU.
func MemoryCostMiB(memoryMiB int) int { return memoryMiB + 448 }

// Status tells what is known now, without booting anything.
func (r *Runner) Status() Status { return Status{} }

// Qualify boots a guest with what New found, remembers whether it works and
// returns the status afterwards. When fresh is false and the answer is
// remembered, it boots nothing.
func (r *Runner) Qualify(ctx context.Context, fresh bool) (Status, error) { return r.Status(), nil }

// Generation returns the sandbox generation together with what else can make a
// failing builder end differently: the shell's hash, CPU model and accelerator.
// It is "" until the accelerator is known (Qualify).
func (r *Runner) Generation() string { return "" }
