package vm

import (
	"context"
	"fmt"
	"os"
	"strings"
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
	var s strings.Builder
	for _, path := range []string{b.qemu.Path, b.shell, kernel.Image, kernel.Modules} {
		info, err := os.Stat(path)
		if err != nil {
			return b.stamped
		}
		fmt.Fprintf(&s, "%s %d %d %d\n", path, info.Sys().(*syscall.Stat_t).Ino, info.Size(), info.ModTime().UnixNano())
	}
	return s.String()
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
			b.old = append(b.old, fresh)
		}
	}
	if ctx.Err() != nil {
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
