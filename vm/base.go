package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
)

// A base is what guests of one architecture are made of, and what is known of
// them. It is set up when all its parts are there.
type base struct {
	arch   *arch
	native bool // the host's own: others are emulated
	qemu   qemu
	kernel Kernel
	shell  string // path
	// stamped is the stamp of the parts when they were found.
	stamped string

	qualifying lock // held by who boots guests to see whether they work
	finding    lock // held by who finds out what guests run on
	found      atomic.Pointer[platform]
	old        []*platform // replaced, see refresh and Qualify; guarded by finding
	// broken tells of guests that are not native and do not work, once that is
	// known.
	broken atomic.Pointer[breakage]
}

// A breakage is why guests do not boot that are made of parts with a stamp.
type breakage struct {
	why   error
	stamp string
}

// A setup is what guests are made of. It does not change.
type setup struct {
	bases   []*base        // the host's own, and others that are set up
	lacking map[*arch]lack // of others that are not
}

// A lack is why an architecture is not set up, and what was seen of its parts
// before they were looked for.
type lack struct {
	why  error
	seen string
}

// findBase finds the parts. All that are missing are joined in its error, each a
// *MissingError, with what else is wrong with them.
func findBase(ctx context.Context, cfg *Config, a *arch) (*base, error) {
	b := &base{arch: a, native: a.name == hostArchName(), qualifying: newLock(), finding: newLock()}
	var errs [4]error
	b.qemu, errs[0] = findQEMU(ctx, cfg.QEMU, a)
	b.kernel, errs[1] = findKernel(cfg.StateDir, cfg.Kernel, a)
	b.shell, errs[2] = findShell(cfg.StateDir, cfg.Busybox, a)
	if !b.native && cfg.AgentBinary == "" {
		errs[3] = checkAgent(a)
	}
	b.stamped = b.stamp(cfg)
	return b, errors.Join(errs[:]...)
}

// findBases finds what the Runner's guests are made of: the host's own
// architecture, without which there is no Runner, and those others that are set
// up, or that cfg.Systems wants.
func (r *Runner) findBases() error {
	host, err := hostArch()
	if err != nil {
		return err
	}
	if r.native, err = findBase(r.life, &r.cfg, host); err != nil {
		return firstOf(err)
	}
	s := &setup{bases: []*base{r.native}, lacking: map[*arch]lack{}}
	for _, a := range arches {
		if a == host || r.cfg.Accel == "kvm" || !r.cfg.wants(a) {
			continue
		}
		seen := r.cfg.seen(a)
		b, err := findBase(r.life, &r.cfg, a)
		switch {
		case err == nil:
			s.bases = append(s.bases, b)
		case len(r.cfg.Systems) > 0: // it was asked for
			return fmt.Errorf("set up %s: %w", a.systems[0], firstOf(err))
		default:
			s.lacking[a] = lack{err, seen}
		}
	}
	r.setup.Store(s)
	return nil
}

// wants reports whether a system of an architecture may be offered.
func (c *Config) wants(a *arch) bool {
	return len(c.Systems) == 0 || slices.ContainsFunc(a.systems, func(s string) bool { return slices.Contains(c.Systems, s) })
}

// firstOf returns the first of joined errors, whose hint is one.
func firstOf(err error) error {
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		return joined.Unwrap()[0]
	}
	return err
}

// builtinSystem is that of derivations whose builder is our own, which runs
// anywhere.
const builtinSystem = "builtin"

// baseOf returns what guests for a system are made of, nil if it is not offered.
func (r *Runner) baseOf(system string) *base {
	if system == builtinSystem {
		return r.native
	}
	if len(r.cfg.Systems) > 0 && !slices.Contains(r.cfg.Systems, system) {
		return nil
	}
	for _, b := range r.setup.Load().bases {
		if slices.Contains(b.arch.systems, system) && b.broken.Load() == nil {
			return b
		}
	}
	return nil
}

// Offers reports whether builds for a system are taken, without booting anything.
func (r *Runner) Offers(system string) bool {
	if r.baseOf(system) == nil {
		r.notice()
	}
	return r.baseOf(system) != nil
}

// A System is one for which guests can build, or could.
type System struct {
	// Name is as Nix has it, for example "aarch64-linux".
	Name string `json:"name"`
	// Offered reports that builds for it are taken. Else WhyNot says how that
	// could be, in words for the operator, who may have switched it off.
	Offered     bool   `json:"offered"`
	SwitchedOff bool   `json:"switchedOff,omitempty"`
	WhyNot      string `json:"whyNot,omitempty"`
	// Broken reports that it is set up, and a guest did not boot.
	Broken bool `json:"broken,omitempty"`
	// Accel is "kvm" or "tcg", "" while that is not known yet; WhyNotKVM is empty
	// under KVM.
	Accel     string `json:"accel,omitempty"`
	WhyNotKVM string `json:"whyNotKvm,omitempty"`
	// QEMU and Kernel are versions, for people.
	QEMU   string `json:"qemu,omitempty"`
	Kernel string `json:"kernel,omitempty"`
}

const (
	whyOff         = "it is switched off (--systems)"
	whyNotEmulated = "guests are not to be emulated (--accel kvm)"
)

// Systems tells of each system whether it is offered, without booting anything.
func (r *Runner) Systems() []System {
	var list []System
	now := r.notice()
	for _, b := range now.bases {
		for _, name := range b.arch.systems {
			s := System{Name: name, Offered: true, QEMU: b.current().qemu.Version, Kernel: b.current().kernel.Name}
			if why := b.broken.Load(); why != nil {
				s.Offered, s.Broken, s.WhyNot = false, true, why.why.Error()
			} else if r.baseOf(name) == nil {
				s.Offered, s.SwitchedOff, s.WhyNot = false, true, whyOff
			}
			if p := b.found.Load(); p != nil {
				s.Accel, s.WhyNotKVM = p.accel, p.notKVM
			} else if !b.native {
				s.Accel, s.WhyNotKVM = "tcg", b.notNative()
			}
			list = append(list, s)
		}
	}
	for _, a := range arches {
		if slices.ContainsFunc(now.bases, func(b *base) bool { return b.arch == a }) {
			continue
		}
		off := System{WhyNot: whyNotEmulated}
		switch why := now.lacking[a].why; {
		case !r.cfg.wants(a):
			off.SwitchedOff, off.WhyNot = true, whyOff
		case why != nil:
			off.WhyNot = "it is not set up: " + strings.ReplaceAll(why.Error(), "\n", "; ")
		}
		for _, name := range a.systems {
			off.Name = name
			list = append(list, off)
		}
	}
	return list
}

// notNative says why guests are emulated although there may be KVM.
func (b *base) notNative() string {
	return fmt.Sprintf("the processors of this machine are %s and not %s", hostArchName(), b.arch.name)
}

// initProgram returns the path of the program that becomes the guests' init,
// and what removes it if it is there for this only.
func (b *base) initProgram(cfg *Config) (path string, remove func() error, err error) {
	switch {
	case b.native:
		return cfg.Binary, func() error { return nil }, nil
	case cfg.AgentBinary != "":
		return cfg.AgentBinary, func() error { return nil }, nil
	}
	path, err = unpackAgent(cfg.RuntimeDir, b.arch)
	return path, func() error { return os.Remove(path) }, err
}

// besideOrInPath returns the file name of an emulator: the one that is
// configured, for the host's own guests, and for others what lies beside it.
func besideOrInPath(configured string, a *arch) string {
	switch {
	case configured == "":
		return a.qemu
	case a.name == hostArchName():
		return configured
	}
	if beside := filepath.Join(filepath.Dir(configured), a.qemu); strings.Contains(configured, "/") {
		if _, err := os.Stat(beside); err == nil {
			return beside
		}
	}
	return a.qemu
}
