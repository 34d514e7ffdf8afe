// Package vm runs one build in one QEMU guest of its own.
//
// # The life of a guest
//
//  1. New finds QEMU, a kernel, the shell of the sandbox and the program that
//     is the guest's init (nbd itself), and touches nothing else. What must be
//     found out by booting (does KVM work, is there a template of this size) is
//     found out on the first Run, once, and remembered in the state directory.
//  2. Run gives the guest a user id of its own, and serves the inputs as one
//     read-only disk, and a sink for the outputs, on sockets that QEMU inherits.
//     No bytes of the inputs are copied.
//  3. The guest starts as a clone of a template: a guest of the same shape that
//     booted once and was saved just after its agent said hello. It gets a copy
//     of the template's memory, scratch disk and state. When that fails the
//     template is dropped and made anew, and the guest boots from cold. Templates
//     are made in the background and kept on the disk (templates.go,
//     savedtemplate.go).
//  4. Clones wake as twins. The host sends entropy and the time; the agent refuses
//     work before.
//  5. The host sends the build order. The log arrives on a port of its own, the
//     outputs in the sink, and what became of the build on the control port.
//  6. QEMU is killed, never asked. Its files have no names; its cgroup is removed
//     and its user id goes back.
//
// # Whose failure it was
//
// Only what the agent said on the control port, or a limit of the Spec that was
// passed, makes a *BuildError. A guest that dies, hangs, panics or ends its
// connection without a result is a failure of our machinery whatever QEMU's
// exit status (a panicked guest exits 0), and may be tried again.
package vm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"nbd/vm/fault"
)

// Generation counts the changes to the sandbox that can make the same builder
// end differently. Raise it by hand with such a change.
const Generation = 2

// DefaultScratchMiB is the size of the scratch disk when a Spec names none.
const DefaultScratchMiB = 50 << 10

// Config says where things are. The zero value of each field but StateDir and
// Blobs works.
type Config struct {
	// StateDir holds imported kernels and what was learned by booting. Required.
	StateDir string
	// RuntimeDir holds the scratch disks of running guests, as files without
	// names; default StateDir/guests.
	RuntimeDir string
	// Blobs opens the inputs. Required by Run.
	Blobs Blobs
	// QEMU is the path of qemu-system-x86_64, or what it is on this machine;
	// default: searched in PATH. Those for other architectures are searched beside
	// it and there.
	QEMU string
	// Systems are those that may be built for; default: all that are set up. One
	// that is listed and not set up is refused.
	Systems []string
	// KVMInBuilds says whether builds may require the features kvm and nixos-test:
	// "auto" (default) where guests have KVM and can run guests, "emulated" also
	// where guests are emulated, or "off".
	KVMInBuilds string
	// Kernel is the path of a kernel image whose modules are in /lib/modules, the
	// name of an imported kernel, or "": the newest imported one, else the
	// host's newest. It counts for the architecture of the kernel.
	Kernel string
	// Accel is "kvm", "tcg", or "auto" (default): KVM if a guest really boots
	// with it.
	Accel string
	// Busybox is the static shell that a build sees as /bin/sh; default:
	// searched where distributions keep it.
	Busybox string
	// Binary is the program that becomes the guest's /init, where that is of the
	// host's architecture; default: the running program. AgentBinary is that for
	// guests of another one; default: what the running program was built with.
	Binary, AgentBinary string
	// Certificates is a PEM file with the authorities that builds with a network
	// may trust; default: searched where distributions keep it.
	Certificates string
	// FirstUID is the first of UIDs user ids (and group ids) that guests run
	// under when the server is root; default 64000, 256 ids.
	FirstUID, UIDs int
	// MaxOutput bounds the bytes of all outputs of one build; default 64 GiB.
	MaxOutput int64
	// Room says why nothing more should be written to the disk of RuntimeDir; nil
	// if there is room. It may be called often. Default: there always is.
	Room func() error
	// ColdBoot turns templates off.
	ColdBoot bool
	// Faults are what breaks builds on purpose; nil: nothing.
	Faults *fault.Plan
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
	// Systems are all that guests are known for, and Features those that depend on
	// what guests can do, offered or not.
	Systems  []System  `json:"systems"`
	Features []Feature `json:"features"`
	// Guests is the number of guests alive now.
	Guests int `json:"guests"`
}

// A Runner runs builds. Its methods are safe for concurrent use.
type Runner struct {
	cfg      Config
	native   *base // for the host's own architecture
	setup    atomic.Pointer[setup]
	noticing sync.Mutex    // held by who replaces setup
	cgroups  cgroupFactory // nil if there are none
	ids      *ids
	// confined is what keeps QEMU from this machine beside its user id.
	confined *confinement
	answers  *answers
	// weak are the weaknesses that New found.
	weak []string

	templates *templates
	saved     *templateStore
	alive     atomic.Int64 // guests
	scratches scratchFiles
	processes processes

	// life ends with Close, and everything that runs with it.
	life context.Context
	end  context.CancelCauseFunc

	mu     sync.Mutex // guards closed and running.Add
	closed bool
	// running counts what Close waits for.
	running sync.WaitGroup

	closing  sync.Once
	closeErr error // of closing
}

// New checks cfg and finds what guests need. Missing things are *MissingError.
// It boots nothing.
func New(cfg Config) (*Runner, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	r := &Runner{cfg: cfg,
		answers: &answers{path: filepath.Join(cfg.StateDir, qualifiedFile)}}
	r.life, r.end = context.WithCancelCause(context.Background())
	budget := templateBudget(machineBytes())
	r.templates, r.saved = newTemplates(budget, cfg.boots()), newSavedTemplates(cfg.StateDir, budget)
	if err := r.findBases(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.RuntimeDir, 0o700); err != nil {
		return nil, fmt.Errorf("make folder of guests: %w", err)
	}
	if err := sweep(cfg.RuntimeDir); err != nil {
		return nil, err
	}
	if text, err := cfg.certificates(); err != nil {
		r.weak = append(r.weak, err.Error())
	} else if text == nil {
		r.weak = append(r.weak, "builds of fixed outputs have no certificates to check https with: install ca-certificates, or name a file with --certificates")
	}
	if inMemory(cfg.RuntimeDir) {
		r.weak = append(r.weak, "scratch disks take memory from their builds: "+cfg.RuntimeDir+" is a tmpfs")
	}
	if cfg.Faults != nil {
		r.weak = append(r.weak, "BUILDS ARE BROKEN ON PURPOSE, by --fault "+cfg.Faults.String())
	}
	var err error
	if r.ids, err = newIDs(cfg.FirstUID, cfg.UIDs); err != nil {
		r.weak = append(r.weak, "guests run under the server's own user id: "+err.Error())
	}
	var weak []string
	r.confined, weak = newConfinement(r.native.qemu.Path, r.ids.first)
	r.weak = append(r.weak, weak...)
	var lacks string
	if r.cgroups, lacks, err = newCgroups(); err != nil {
		r.weak = append(r.weak, "guests run without a cgroup that bounds their memory: "+err.Error())
	} else if lacks != "" {
		r.weak = append(r.weak, lacks)
	}
	return r, nil
}

// machineBytes returns how much memory the machine has, 0 if that is not told.
func machineBytes() int64 {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0
	}
	return int64(info.Totalram) * int64(info.Unit)
}

// inMemory reports whether files in dir lie in memory.
func inMemory(dir string) bool {
	var st unix.Statfs_t
	return unix.Statfs(dir, &st) == nil && st.Type == unix.TMPFS_MAGIC
}

// complete fills in what is not set and refuses what cannot be.
func (c *Config) complete() error {
	switch {
	case c.StateDir == "":
		return errors.New("vm: Config.StateDir is not set")
	case !slices.Contains([]string{"", "auto", "kvm", "tcg"}, c.Accel):
		return fmt.Errorf("accelerator %q is not one of auto, kvm and tcg", c.Accel)
	case !slices.Contains([]string{"", nestedAuto, nestedEmulated, nestedOff}, c.KVMInBuilds):
		return fmt.Errorf("kvm-in-builds %q is not one of auto, emulated and off", c.KVMInBuilds)
	case c.FirstUID < 0 || c.UIDs < 0 || c.MaxOutput < 0:
		return errors.New("vm: negative number in Config")
	}
	for _, name := range c.Systems {
		switch a := archOf(name); {
		case a == nil:
			return fmt.Errorf("there are no guests for the system %q", name)
		case c.Accel == "kvm" && a.name != hostArchName():
			return fmt.Errorf("set up %s: %s", name, whyNotEmulated)
		}
	}
	if c.Certificates != "" {
		if _, err := c.certificates(); err != nil {
			return err
		}
	}
	c.RuntimeDir = cmp.Or(c.RuntimeDir, filepath.Join(c.StateDir, "guests"))
	c.FirstUID = cmp.Or(c.FirstUID, 64000)
	c.UIDs = cmp.Or(c.UIDs, 256)
	c.MaxOutput = cmp.Or(c.MaxOutput, 64<<30)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Binary == "" {
		var err error
		if c.Binary, err = os.Executable(); err != nil {
			return fmt.Errorf("find own program: %w", err)
		}
	}
	return nil
}

// Close kills all guests, waits for their Runs and frees the templates. Only the
// first call does anything; others wait for it.
func (r *Runner) Close() error {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.closing.Do(func() { r.closeErr = r.close() })
	return r.closeErr
}

func (r *Runner) close() error {
	r.end(ErrClosed)
	r.running.Wait()
	r.templates.close()
	var errs []error
	for _, b := range r.setup.Load().bases {
		if p := b.found.Swap(nil); p != nil {
			errs = append(errs, p.boot.close())
		}
		for _, p := range b.old {
			errs = append(errs, p.boot.close())
		}
	}
	if r.cgroups != nil {
		errs = append(errs, r.cgroups.close())
	}
	return errors.Join(errs...)
}

// enter joins ctx with the Runner's life. leave must be called at the end.
func (r *Runner) enter(ctx context.Context) (_ context.Context, leave func(), err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, nil, ErrClosed
	}
	r.running.Add(1)
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(r.life, func() { cancel(ErrClosed) })
	return ctx, func() { stop(); cancel(nil); r.running.Done() }, nil
}

// Status tells what is known now, without booting anything.
func (r *Runner) Status() Status {
	native := r.native.current()
	s := Status{
		QEMU: native.qemu.Version, QEMUPath: native.qemu.Path,
		Kernel: native.kernel.Name, KernelPath: native.kernel.Image, Busybox: native.shell,
		Systems: r.Systems(), Features: r.Features(),
		Guests: int(r.alive.Load()), Weaknesses: slices.Clone(r.weak),
	}
	if p := r.native.found.Load(); p != nil {
		s.Accel, s.WhyNotKVM, s.CPU, s.Generation = p.accel, p.notKVM, p.arch.cpuModel(p.accel), p.generation()
		s.Weaknesses = append(s.Weaknesses, p.warnings()...)
	}
	var failures []error
	s.Templates, failures = r.templates.count()
	for _, err := range failures {
		s.Weaknesses = append(s.Weaknesses, "guests boot from cold: "+err.Error())
	}
	return s
}

// Qualify boots guests with what New found, remembers whether they work and
// returns the status afterwards; an error says that guests of the host's own
// architecture do not work at all. Systems and features that did not work are not
// offered. When fresh is false and the answers are remembered, it boots nothing.
func (r *Runner) Qualify(ctx context.Context, fresh bool) (Status, error) {
	ctx, leave, err := r.enter(ctx)
	if err != nil {
		return r.Status(), err
	}
	defer leave()
	for _, b := range r.setup.Load().bases {
		if err := r.try(ctx, b, fresh); err != nil {
			return r.Status(), err
		}
	}
	return r.Status(), nil
}

// try boots guests of one base, and notes of others than the native one whether
// they work; its errors are of the native one and the context's.
func (r *Runner) try(ctx context.Context, b *base, fresh bool) error {
	stamp := b.stamp(&r.cfg)
	err := r.qualify(ctx, b, fresh)
	switch {
	case err == nil:
		b.broken.Store(nil)
	case b.native || ctx.Err() != nil:
		return err
	default:
		b.broken.Store(&breakage{err, stamp})
		r.cfg.Logger.Error("guests do not boot", "arch", b.arch.name, "err", err)
	}
	return nil
}

// qualify is Qualify for the guests of one base.
func (r *Runner) qualify(ctx context.Context, b *base, fresh bool) error {
	// Who comes second finds the answers.
	if err := b.qualifying.lock(ctx); err != nil {
		return err
	}
	defer b.qualifying.unlock()
	p, err := r.qualified(ctx, b, fresh)
	if err != nil {
		return err
	}
	if err := r.qualifyBoot(ctx, p, fresh); err != nil {
		return err
	}
	return r.tryNested(ctx, p)
}

// qualifyBoot boots a guest unless it is known that one does.
func (r *Runner) qualifyBoot(ctx context.Context, p *platform, fresh bool) error {
	if p.accel == "kvm" {
		return nil // it was booted to be chosen
	}
	key, err := p.pairKey(p.accel)
	if err != nil {
		return err
	}
	known, _, err := r.answers.get(key)
	if err != nil || known.Works && !fresh {
		return err
	}
	if err := r.bootOnce(ctx, p, machine{arch: p.arch, accel: p.accel, tscKHz: p.tscKHz}); err != nil {
		return fmt.Errorf("boot a guest with kernel %s and QEMU %s: %w", p.kernel.Name, p.qemu.Version, err)
	}
	return r.answers.put(key, answer{Works: true, When: time.Now()})
}

// qualified returns the platform, found out anew if fresh.
func (r *Runner) qualified(ctx context.Context, b *base, fresh bool) (*platform, error) {
	if !fresh {
		return r.platform(ctx, b)
	}
	if err := b.finding.lock(ctx); err != nil {
		return nil, err
	}
	defer b.finding.unlock()
	p, err := r.find(ctx, b, true)
	if err != nil {
		return nil, err
	}
	if old := b.found.Swap(p); old != nil {
		b.old = append(b.old, old)
		r.renewTemplates(p)
	}
	return p, nil
}

// Generation returns the sandbox generation of builds for a system, together
// with what else can make a failing builder end differently: the shell's hash,
// CPU model and accelerator. The last may have to be found out first, by booting
// a guest. It is "" for a system that is not offered.
func (r *Runner) Generation(ctx context.Context, system string) (string, error) {
	b := r.baseOf(system)
	if b == nil {
		return "", nil
	}
	ctx, leave, err := r.enter(ctx)
	if err != nil {
		return "", err
	}
	defer leave()
	p, err := r.platform(ctx, b)
	if err != nil {
		return "", err
	}
	return p.generation(), nil
}

// Emulated reports whether builds for a system run in emulated guests, as far as
// that is known.
func (r *Runner) Emulated(system string) bool {
	b := r.baseOf(system)
	if b == nil {
		return false
	}
	p := b.found.Load()
	return p != nil && p.accel == "tcg"
}
