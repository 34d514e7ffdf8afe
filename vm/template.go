package vm

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A template is a guest that has booted and was saved. Clones get a copy of its
// scratch disk and of its memory, of the hundred or so MiB that are in use.
//
// Sharing the memory, mapped privately by each clone, would start a guest a
// tenth of a second sooner, and then cost far more: a page that a clone touches
// for the first time is a hole in the shared file, and the kernel fills the hole
// for good before it copies the page. So all clones together would pay for each
// page twice, and the template would grow to the guest's full size.
type template struct {
	ram, state, disk *os.File // memfds; the last one is the scratch disk
	mu               sync.Mutex
	users            int // the table, clones being started, and who writes it to the disk
}

// newTemplate returns a template that is to be filled, with one use.
func newTemplate(memoryMiB, scratchGiB int) (_ *template, err error) {
	t := &template{users: 1}
	defer func() {
		if err != nil {
			t.release()
		}
	}()
	if t.ram, err = memfd("nbd-template", int64(memoryMiB)<<20); err != nil {
		return nil, err
	}
	if t.state, err = memfd("nbd-template-state", 0); err != nil {
		return nil, err
	}
	if t.disk, err = memfd("nbd-template-disk", int64(scratchGiB)<<30); err != nil {
		return nil, err
	}
	return t, nil
}

func (t *template) files() []*os.File { return []*os.File{t.ram, t.state, t.disk} }

// seal makes the template immutable. Nobody may have it mapped for writing.
func (t *template) seal() error {
	const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
	for _, f := range t.files() {
		if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals); err != nil {
			return fmt.Errorf("seal template: %w", err)
		}
	}
	return nil
}

// bytes is how much memory the template takes.
func (t *template) bytes() int64 {
	var sum int64
	for _, f := range t.files() {
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err == nil {
			sum += st.Blocks * 512
		}
	}
	return sum
}

// release gives up one use of the template. Guests that run have copies.
func (t *template) release() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.users--; t.users == 0 {
		closeAll(t.files())
	}
}

func (t *template) retain() *template {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.users++
	return t
}

// templateID names what a template depends on: everything that goes into the
// guest, the program that runs it, and with hardware this machine's processor
// and kernel.
func (p *platform) templateID(m machine) string {
	h := sha256.New()
	_, initrd := p.boot.initrdFor(m)
	fmt.Fprintf(h, "%s\n%s\n%s\n%d\n%s\n", p.qemu.id, p.boot.kernelHash, initrd, m.scratchGiB,
		strings.Join(arguments(m, modeClone), "\n"))
	if m.accel == "kvm" {
		fmt.Fprintf(h, "%s\n", hostID())
	}
	return hex.EncodeToString(h.Sum(nil))
}

// hostID names the processor and the kernel of this machine.
var hostID = sync.OnceValue(func() string {
	cpuinfo, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		cpuinfo = nil // an unknown processor is one, too
	}
	first, _, _ := strings.Cut(string(cpuinfo), "\n\n")
	lines := slices.DeleteFunc(strings.Split(first, "\n"), func(l string) bool { return strings.HasPrefix(l, "cpu MHz") })
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		uts = unix.Utsname{}
	}
	return strings.Join(append(lines, unix.ByteSliceToString(uts.Release[:]), unix.ByteSliceToString(uts.Version[:])), "\n")
})

// makeTemplate boots a guest, saves it and proves that a clone of it wakes.
func (r *Runner) makeTemplate(ctx context.Context, p *platform, m machine) (*template, error) {
	start := time.Now()
	t, err := r.saveGuest(ctx, p, m)
	if err != nil {
		return nil, fmt.Errorf("make template: %w", err)
	}
	g, err := r.clone(ctx, p, m, t, emptyDisks(), wholeMachine(m))
	if err == nil {
		err = g.close()
	}
	if err != nil {
		t.release()
		return nil, fmt.Errorf("prove template: %w", err)
	}
	r.cfg.Logger.Info("guest template made", "vcpus", m.vcpus, "memory_mib", m.memoryMiB,
		"accel", m.accel, "took", time.Since(start).Round(time.Millisecond))
	return t, nil
}

// emptyDisks returns disks for guests that run no build.
func emptyDisks() guestDisks {
	return guestDisks{inputs: NewDisk(), sink: NewSink(SinkConfig{})}
}

// saveGuest boots a guest and saves it. What it has written to its scratch disk is
// a part of it: its kernel remembers.
func (r *Runner) saveGuest(ctx context.Context, p *platform, m machine) (_ *template, err error) {
	t, err := newTemplate(m.memoryMiB, m.scratchGiB)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			t.release()
		}
	}()
	if err := writeScratch(t.disk, m.scratchGiB); err != nil {
		return nil, err
	}
	scratch, err := duplicate(t.disk)
	if err != nil {
		return nil, err
	}
	g, err := r.launch(ctx, p, m, modeBoot, t.ram, scratch, emptyDisks(), wholeMachine(m))
	if err != nil {
		return nil, err
	}
	err = g.save(ctx, t.state)
	// Only when QEMU is gone can its memory be sealed, against our own mistakes.
	if err := errors.Join(err, g.close()); err != nil {
		return nil, err
	}
	if err := scrub(t.ram, int64(m.memoryMiB)<<20); err != nil {
		return nil, err
	}
	return t, t.seal()
}

// save waits until the guest has booted and saves it without its memory.
func (g *guestVM) save(ctx context.Context, state *os.File) error {
	if _, err := g.hello(ctx); err != nil {
		return err
	}
	ctx, stop := g.within(ctx, bootPatience, "the guest was not saved in time")
	defer stop()
	if err := g.qmp.migrate(ctx, "migrate", state); err != nil {
		return g.explain(fmt.Errorf("save guest: %w", err))
	}
	return nil
}

// A share is what a guest gets of its machine and of the host.
type share struct {
	cpus     int // processors that are brought up, of those on demand
	limitMiB int // memory of QEMU's cgroup
}

func wholeMachine(m machine) share {
	return share{cpus: m.vcpus, limitMiB: m.memoryMiB + overheadMiB}
}

// clone starts a guest from a template and wakes it. What the template may be to
// blame for is a *templateError.
func (r *Runner) clone(ctx context.Context, p *platform, m machine, t *template, disks guestDisks, gets share) (*guestVM, error) {
	ram, err := memfd("nbd-guest", int64(m.memoryMiB)<<20)
	if err != nil {
		return nil, err
	}
	defer ram.Close()
	// Each clone reads the state through an open file of its own.
	state, err := reopen(t.state)
	if err != nil {
		return nil, err
	}
	defer state.Close()
	scratch, err := r.scratchFile(func(f *os.File) error {
		size := int64(m.scratchGiB) << 30
		return errors.Join(f.Truncate(size), copySparse(f, t.disk, size))
	})
	if err != nil {
		return nil, err
	}
	// QEMU looks at the memory when it restores the state, and not before.
	copied := make(chan error, 1)
	go func() { copied <- copySparse(ram, t.ram, int64(m.memoryMiB)<<20) }()
	g, err := r.launch(ctx, p, m, modeClone, ram, scratch, disks, gets)
	if cerr := <-copied; err == nil && cerr != nil {
		err = errors.Join(cerr, g.close())
	}
	if err != nil {
		return nil, err
	}
	err = g.restore(ctx, state)
	if err == nil {
		err = g.wake(ctx, gets.cpus)
	}
	if err != nil {
		return nil, &templateError{errors.Join(err, g.close())}
	}
	return g, nil
}

// A templateError says that a guest could not be restored or did not wake, which
// may be its template's fault.
type templateError struct{ err error }

func (e *templateError) Error() string { return e.err.Error() }
func (e *templateError) Unwrap() error { return e.err }

// cold boots a guest and wakes it.
func (r *Runner) cold(ctx context.Context, p *platform, m machine, disks guestDisks, gets share) (*guestVM, error) {
	ram, err := memfd("nbd-guest", int64(m.memoryMiB)<<20)
	if err != nil {
		return nil, err
	}
	defer ram.Close()
	scratch, err := r.scratchFile(func(f *os.File) error { return writeScratch(f, m.scratchGiB) })
	if err != nil {
		return nil, err
	}
	g, err := r.launch(ctx, p, m, modeBoot, ram, scratch, disks, gets)
	if err != nil {
		return nil, err
	}
	if _, err := g.hello(ctx); err != nil {
		return nil, errors.Join(err, g.close())
	}
	if err := g.wake(ctx, gets.cpus); err != nil {
		return nil, errors.Join(err, g.close())
	}
	return g, nil
}

// memfd returns a sparse file in memory.
func memfd(name string, size int64) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("make memory file: %w", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if err := f.Truncate(size); err != nil {
		return nil, errors.Join(fmt.Errorf("make memory file: %w", err), f.Close())
	}
	return f, nil
}

// duplicate returns another descriptor of f's open file.
func duplicate(f *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate %s: %w", f.Name(), err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// reopen returns a new open file of f, at its start, read only.
func reopen(f *os.File) (*os.File, error) {
	n, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err != nil {
		return nil, fmt.Errorf("open saved guest: %w", err)
	}
	return n, nil
}
