package vm

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
)

// What guests are made of may be replaced while the server runs: QEMU by the
// distribution, the kernel by an import, the shell. Guests that start then are
// made of the new parts, and templates with them. It is a few looks at files
// that tells, before each guest.

// stamp changes when a part does. A part that is not there now, as in the midst
// of an upgrade, counts as unchanged.
func (b *base) stamp(cfg *Config) string {
	kernel, err := findKernel(cfg.StateDir, cfg.Kernel, b.arch)
	if err != nil {
		kernel = b.kernel
	}
	all := stampOf(shellPath(cfg.StateDir, b.arch)) // it goes before the host's
	for _, path := range []string{b.qemu.Path, b.shell, kernel.Image, kernel.Modules} {
		s := stampOf(path)
		if s == "" {
			return b.stamped
		}
		all += s
	}
	return all
}

// stampOf changes when what is at a path does; "" if nothing is.
func stampOf(path string) string {
	info, err := os.Stat(path)
	if err != nil {
		return ""
	}
	return fmt.Sprintf("%s %d %d %d\n", path, info.Sys().(*syscall.Stat_t).Ino, info.Size(), info.ModTime().UnixNano())
}

// seen changes when parts of guests come that are not the host's own.
func (c *Config) seen(a *arch) string {
	qemu, err := exec.LookPath(besideOrInPath(c.QEMU, a))
	if err != nil {
		qemu = ""
	}
	return stampOf(qemu) + stampOf(filepath.Join(c.StateDir, kernelsDir)) + stampOf(shellPath(c.StateDir, a))
}

// notice returns the setup, after another look at architectures whose parts were
// not there and are now, or did not work and are others now. New guests are tried
// in the background; what did not work is not offered before.
func (r *Runner) notice() *setup {
	r.noticing.Lock()
	defer r.noticing.Unlock()
	s := r.setup.Load()
	for _, b := range s.bases {
		if old := b.broken.Load(); old != nil {
			if stamp := b.stamp(&r.cfg); stamp != old.stamp {
				b.broken.Store(&breakage{old.why, stamp})
				r.tryLater(b)
			}
		}
	}
	for a, old := range s.lacking {
		seen := r.cfg.seen(a)
		if seen == old.seen {
			continue
		}
		b, err := findBase(r.life, &r.cfg, a)
		next := &setup{slices.Clone(s.bases), maps.Clone(s.lacking)}
		if err != nil {
			next.lacking[a] = lack{err, seen}
		} else {
			delete(next.lacking, a)
			next.bases = append(next.bases, b)
			r.cfg.Logger.Info("guests are set up", "arch", a.name, "kernel", b.kernel.Name, "qemu", b.qemu.Version)
			r.tryLater(b)
		}
		s = next
	}
	r.setup.Store(s)
	return s
}

// tryLater tries guests in the background.
func (r *Runner) tryLater(b *base) {
	ctx, leave, err := r.enter(r.life)
	if err != nil {
		return // it was closed
	}
	go func() {
		defer leave()
		_ = r.try(ctx, b, false) // that of a Runner that was closed
	}()
}

// latest returns b, or what is to be used in its place if a part has changed.
func (b *base) latest(ctx context.Context, cfg *Config) (*base, error) {
	if b.stamp(cfg) == b.stamped {
		return b, nil
	}
	return findBase(ctx, cfg, b.arch)
}

// current returns what guests are made of now, for people.
func (b *base) current() *base {
	if p := b.found.Load(); p != nil {
		return p.of
	}
	return b
}

// refresh returns the platform to use, p or, if it is made of what was replaced,
// a new one: unless that cannot be used. b.finding is held.
func (r *Runner) refresh(ctx context.Context, b *base, p *platform) (*platform, error) {
	if p.of.stamp(&r.cfg) == p.of.stamped {
		return p, nil
	}
	fresh, err := r.find(ctx, b, false)
	if err == nil && p.canNest() {
		if err = r.tryNested(ctx, fresh); err != nil {
			err = errors.Join(err, fresh.boot.close())
		}
	}
	if err != nil && ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err != nil {
		r.cfg.Logger.Warn("guests are made of what was there before", "arch", b.arch.name, "err", err)
		return p, nil
	}
	r.cfg.Logger.Info("guests are made of new parts from now on", "kernel", fresh.kernel.Name, "qemu", fresh.qemu.Version)
	b.old = append(b.old, p)
	b.found.Store(fresh)
	r.renewTemplates(fresh)
	return fresh, nil
}
