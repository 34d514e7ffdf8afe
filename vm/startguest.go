package vm

import (
	"context"
	"errors"
	"os"
	"runtime"
	"slices"
	"strings"
)

// templateBudget is how much memory templates take in all on a machine with so
// much, and how much of the disk: one is 100 to 300 MiB.
func templateBudget(machineBytes int64) int64 { return max(1<<30, machineBytes/16) }

// boots is how many guests may boot for builds at once: a processor for each, and
// one for a template that is being made.
func (c *Config) boots() int {
	n := runtime.GOMAXPROCS(0)
	if !c.ColdBoot {
		n--
	}
	return max(1, n)
}

// maxRemade is how many templates are made anew at once when what they depend on
// has changed: those that were used last.
const maxRemade = 3

// startGuest starts a guest from a template, or else from cold, and wakes it.
func (r *Runner) startGuest(ctx context.Context, p *platform, m machine, disks guestDisks, spec *Spec) (*guestVM, error) {
	gets := share{cpus: spec.Cores, limitMiB: MemoryCostMiB(spec.MemoryMiB)}
	if r.cfg.ColdBoot {
		booted, err := r.templates.boot(ctx)
		if err != nil {
			return nil, err
		}
		defer booted()
		return r.cold(ctx, p, m, disks, gets)
	}
	l, booted, err := r.templates.take(ctx, p, m, r.templateMaker(p, m))
	if l != nil {
		g, err := r.cloneOf(ctx, l, disks, gets)
		var bad *templateError
		if !errors.As(err, &bad) || ctx.Err() != nil {
			return g, err
		}
		r.dropTemplate(l, err, spec)
		if booted, err = r.templates.boot(ctx); err != nil {
			return nil, err
		}
	} else if booted == nil {
		return nil, err
	} else if err != nil {
		r.cfg.Logger.Warn("no guest template, booting from cold", "build", spec.BuildID, "err", err)
	}
	defer booted()
	return r.cold(ctx, p, m, disks, gets)
}

// cloneOf starts a guest from a template that was taken, and gives that back.
func (r *Runner) cloneOf(ctx context.Context, l *loan, disks guestDisks, gets share) (*guestVM, error) {
	defer l.release()
	g, err := r.clone(ctx, l.slot.p, l.slot.machine, l.template, disks, gets)
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, err
	}
	g.restored = true
	return g, nil
}

// dropTemplate forgets a template, of which no guest could be made.
func (r *Runner) dropTemplate(l *loan, why error, spec *Spec) {
	s := l.slot
	if r.templates.drop(l, why, r.templateMaker(s.p, s.machine)) {
		if err := r.saved.remove(s.id); err != nil {
			r.cfg.Logger.Error("guest template", "err", err)
		}
	}
	r.cfg.Logger.Warn("guest template dropped, booting from cold", "build", spec.BuildID, "err", why)
}

// templateMaker says where templates for a machine come from. They are made for
// all: what it does outlives who asked first.
func (r *Runner) templateMaker(p *platform, m machine) templateMaker {
	return templateMaker{
		load: func(id string) *template {
			t, err := r.saved.load(id)
			if err == nil {
				r.cfg.Logger.Info("guest template read", "vcpus", m.vcpus, "memory_mib", m.memoryMiB, "arch", m.arch.name)
				return t
			}
			if !errors.Is(err, os.ErrNotExist) {
				r.cfg.Logger.Warn("guest template is made anew", "err", errors.Join(err, r.saved.remove(id)))
			}
			return nil
		},
		boot: func() (*template, error) {
			life, leave, err := r.enter(context.Background())
			if err != nil {
				return nil, err
			}
			defer leave()
			return r.makeTemplate(life, p, m)
		},
		keep: func(id string, t *template) {
			defer t.release()
			err := r.cfg.room()
			if err == nil {
				err = r.saved.save(id, m, t)
			}
			if err != nil {
				r.cfg.Logger.Warn("guest template is made again after a restart", "err", err)
			}
		},
	}
}

// room says why nothing more should be written.
func (c *Config) room() error {
	if c.Room == nil {
		return nil
	}
	return c.Room()
}

// renewTemplates gets templates for a platform that was just found: it reads
// those that were kept, and has those made anew that were for another one of the
// same architecture. It only starts that.
func (r *Runner) renewTemplates(p *platform) {
	if r.cfg.ColdBoot {
		return
	}
	r.running.Go(func() {
		stale := r.staleTemplates(p)
		for _, m := range stale[:min(len(stale), maxRemade)] {
			r.templates.want(p, m, r.templateMaker(p, m))
		}
	})
}

// staleTemplates reads the templates that are good for a platform and forgets
// those that are no good any more. It returns the machines of these, the one used
// last first.
func (r *Runner) staleTemplates(p *platform) (machines []machine) {
	again := func(m machine) {
		if m.onDemand == p.onDemand && (!m.kvm || p.boot.nested != nil) && !slices.Contains(machines, m) {
			machines = append(machines, m)
		}
	}
	for _, s := range r.templates.replace(func(old *platform) bool { return old == p || old.arch != p.arch }) {
		m := s.machine
		m.accel, m.tscKHz = p.accel, p.tscKHz
		again(m)
	}
	files, err := r.saved.list()
	if err != nil {
		r.cfg.Logger.Warn("guest templates", "err", err)
	}
	for _, f := range files {
		if strings.HasPrefix(f.name, savedNew) {
			continue
		}
		h, err := r.saved.header(f.name)
		if err == nil && h.Arch != p.arch.name {
			continue
		}
		if err == nil {
			m := h.machine(p)
			if p.templateID(m) == h.ID {
				r.templates.want(p, m, r.templateMaker(p, m))
				continue
			}
			again(m)
		}
		if err := errors.Join(err, r.saved.remove(f.name)); err != nil {
			r.cfg.Logger.Warn("guest template removed", "err", err)
		}
	}
	return machines
}
