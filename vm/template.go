package vm

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// templateRetry is how long guests boot from cold after a template could not be
// made.
const templateRetry = 10 * time.Minute

// A template is a guest that has booted and was saved. Clones get a copy of its
// memory, of the hundred or so MiB that are in use.
//
// Sharing the memory, mapped privately by each clone, would start a guest a
// tenth of a second sooner, and then cost far more: a page that a clone touches
// for the first time is a hole in the shared file, and the kernel fills the hole
// for good before it copies the page. So all clones together would pay for each
// page twice, and the template would grow to the guest's full size.
type template struct {
	ram, state *os.File // memfds
	mu         sync.Mutex
	users      int // clones being started, and one for being in the table
}

// close gives up one use of the template. Guests that run hold its memory by
// themselves.
func (t *template) release() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.users--; t.users == 0 {
		closeAll([]*os.File{t.ram, t.state})
	}
}

func (t *template) retain() *template {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.users++
	return t
}

// templates holds a template for each kind of machine that was asked for.
type templates struct {
	mu   sync.Mutex
	byID map[string]*templateSlot
}

// A templateSlot is where one template is, is being made, or was not made.
type templateSlot struct {
	done chan struct{} // closed when the making has ended
	// The fields below are written before done is closed.
	template *template // holds a use; nil after a failure
	err      error
	at       time.Time
}

// templateID names what a template depends on: everything that goes into the
// guest, and the program that runs it.
func (p *platform) templateID(m machine) string {
	h := sha256.New()
	_, initrd := p.boot.initrdFor(m)
	fmt.Fprintf(h, "%s\n%s\n%s\n%s\n", p.qemu.id, p.boot.kernelHash, initrd,
		strings.Join(arguments(m, modeClone), "\n"))
	return hex.EncodeToString(h.Sum(nil))
}

// get returns the template with that id, for one use that ends with release. If
// there is none make makes it, once however many wait; they wait no longer
// than ctx. A failure is remembered for templateRetry.
func (t *templates) get(ctx context.Context, id string, make func() (*template, error)) (*template, error) {
	t.mu.Lock()
	s := t.byID[id]
	if s == nil || s.expired() {
		s = t.startLocked(id, make)
	}
	t.mu.Unlock()
	select {
	case <-s.done:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if s.err != nil {
		return nil, s.err
	}
	if t.byID[id] != s {
		return nil, errors.New("the template was dropped")
	}
	return s.template.retain(), nil
}

// expired reports that the slot holds a failure that is to be tried again.
func (s *templateSlot) expired() bool {
	select {
	case <-s.done:
		return s.err != nil && time.Since(s.at) > templateRetry
	default:
		return false
	}
}

// startLocked starts the making of a template.
func (t *templates) startLocked(id string, make func() (*template, error)) *templateSlot {
	s := &templateSlot{done: newDone()}
	t.byID[id] = s
	go func() {
		s.template, s.err = make()
		s.at = time.Now()
		close(s.done)
	}()
	return s
}

func newDone() chan struct{} { return make(chan struct{}) }

// drop forgets a template that did not work.
func (t *templates) drop(id string, bad *template) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s := t.byID[id]; s != nil && s.template == bad {
		delete(t.byID, id)
		bad.release()
	}
}

// count returns how many templates are ready, and the errors of those that
// could not be made.
func (t *templates) count() (ready int, failures []error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, s := range t.byID {
		select {
		case <-s.done:
			if s.err != nil {
				failures = append(failures, s.err)
			} else {
				ready++
			}
		default:
		}
	}
	return ready, failures
}

// close waits for templates being made and frees all.
func (t *templates) close() {
	t.mu.Lock()
	slots := t.byID
	t.byID = map[string]*templateSlot{}
	t.mu.Unlock()
	for _, s := range slots {
		<-s.done
		if s.template != nil {
			s.template.release()
		}
	}
}

// makeTemplate boots a guest, saves it and proves that a clone of it wakes.
func (r *Runner) makeTemplate(ctx context.Context, p *platform, m machine) (*template, error) {
	start := time.Now()
	t, err := r.saveGuest(ctx, p, m)
	if err != nil {
		return nil, fmt.Errorf("make template: %w", err)
	}
	g, err := r.clone(ctx, p, m, t, emptyDisks(), m.memoryMiB+overheadMiB)
	if err != nil {
		t.release()
		return nil, fmt.Errorf("prove template: %w", err)
	}
	if err := g.close(); err != nil {
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

// saveGuest boots a guest and saves it.
func (r *Runner) saveGuest(ctx context.Context, p *platform, m machine) (_ *template, err error) {
	t := &template{users: 1}
	defer func() {
		if err != nil {
			t.release()
		}
	}()
	if t.ram, err = memfd("nbd-template", int64(m.memoryMiB)<<20); err != nil {
		return nil, err
	}
	if t.state, err = memfd("nbd-template-state", 0); err != nil {
		return nil, err
	}
	disks := emptyDisks()
	defer disks.sink.Close()
	g, err := r.launch(ctx, p, m, modeBoot, t.ram, disks, m.memoryMiB+overheadMiB)
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
	return t, errors.Join(seal(t.ram), seal(t.state))
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

// clone starts a guest from a template and wakes it.
func (r *Runner) clone(ctx context.Context, p *platform, m machine, t *template, disks guestDisks, limitMiB int) (*guestVM, error) {
	ram, err := memfd("nbd-guest", int64(m.memoryMiB)<<20)
	if err != nil {
		return nil, err
	}
	defer ram.Close()
	if err := copySparse(ram, t.ram, int64(m.memoryMiB)<<20); err != nil {
		return nil, err
	}
	// Each clone reads the state through an open file of its own.
	state, err := reopen(t.state)
	if err != nil {
		return nil, err
	}
	defer state.Close()
	g, err := r.launch(ctx, p, m, modeClone, ram, disks, limitMiB)
	if err != nil {
		return nil, err
	}
	if err := g.restore(ctx, state); err != nil {
		return nil, errors.Join(err, g.close())
	}
	if err := g.wake(ctx); err != nil {
		return nil, errors.Join(err, g.close())
	}
	return g, nil
}

// cold boots a guest and wakes it.
func (r *Runner) cold(ctx context.Context, p *platform, m machine, disks guestDisks, limitMiB int) (*guestVM, error) {
	ram, err := memfd("nbd-guest", int64(m.memoryMiB)<<20)
	if err != nil {
		return nil, err
	}
	defer ram.Close()
	g, err := r.launch(ctx, p, m, modeBoot, ram, disks, limitMiB)
	if err != nil {
		return nil, err
	}
	if _, err := g.hello(ctx); err != nil {
		return nil, errors.Join(err, g.close())
	}
	if err := g.wake(ctx); err != nil {
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

// seal makes a memory file immutable. Nobody may have it mapped for writing.
func seal(f *os.File) error {
	const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		return fmt.Errorf("seal template: %w", err)
	}
	return nil
}

// reopen returns a new open file of f, at its start, read only.
func reopen(f *os.File) (*os.File, error) {
	n, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err != nil {
		return nil, fmt.Errorf("open saved guest: %w", err)
	}
	return n, nil
}
