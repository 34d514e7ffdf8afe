package vm

import (
	"context"
	"fmt"
	"io"
	"slices"
	"time"
)

// Guests in which builds may run guests of their own: the system features kvm
// and nixos-test. They are machines of a class of their own (machine.kvm), whose
// initramfs has the modules of KVM, and whose agent says before hello whether
// the build user could make a virtual machine there. A guest of the class that
// cannot does not get that far.

// The values of Config.KVMInBuilds.
const (
	nestedAuto     = "auto"
	nestedEmulated = "emulated"
	nestedOff      = "off"
)

// A Feature is a system feature that guests could have.
type Feature struct {
	Name string `json:"name"`
	// Offered reports that builds may require it. Else WhyNot says why not, in
	// words for the operator, who may have switched it off.
	Offered     bool   `json:"offered"`
	SwitchedOff bool   `json:"switchedOff,omitempty"`
	WhyNot      string `json:"whyNot,omitempty"`
	// Unknown reports that this is still being found out, see Qualify.
	Unknown bool `json:"unknown,omitempty"`
}

// Features tells of the features that depend on what guests can do, without
// booting anything.
func (r *Runner) Features() []Feature {
	f := Feature{WhyNot: "it is not known yet whether guests of this machine can run guests", Unknown: true}
	if r.cfg.KVMInBuilds == nestedOff {
		f.WhyNot, f.SwitchedOff, f.Unknown = whyNestedOff, true, false
	} else if p := r.native.found.Load(); p != nil {
		if p.noNested != "" {
			f.WhyNot, f.Unknown = p.noNested, false
		} else if a := p.nested.Load(); a != nil {
			f = Feature{Offered: a.Works}
			if !a.Works {
				f.WhyNot = "a guest was tried on " + a.When.Format(time.DateOnly) + ": " + a.Reason
			}
		}
	}
	kvm, test := f, f
	kvm.Name, test.Name = "kvm", "nixos-test"
	return []Feature{kvm, test, {Name: "uid-range", WhyNot: "the sandbox of a build has one user id"}}
}

const whyNestedOff = "it is switched off (--kvm-in-builds)"

// whyNotNested says why guests of a platform are not to run guests, "" if it is
// to be tried.
func (r *Runner) whyNotNested(p *platform) string {
	switch {
	case r.cfg.KVMInBuilds == nestedOff:
		return whyNestedOff
	case len(p.arch.kvmModules) == 0:
		return "guests for " + p.arch.name + " cannot run guests"
	case p.accel == "tcg" && r.cfg.KVMInBuilds != nestedEmulated:
		return "guests are emulated; --kvm-in-builds emulated offers a very slow one"
	}
	return ""
}

// findNested makes what guests that run guests boot, and recalls whether they
// can.
func (r *Runner) findNested(b *base, p *platform, fresh bool) (err error) {
	if !b.native {
		return nil
	}
	if p.noNested = r.whyNotNested(p); p.noNested != "" {
		return nil
	}
	if err := p.boot.addNested(r.cfg.RuntimeDir, b, r.cfg.Binary); err != nil {
		return err
	}
	key, err := p.nestedKey()
	if err != nil || fresh {
		return err
	}
	known, ok, err := r.answers.get(key)
	if err == nil && ok {
		p.nested.Store(&known)
	}
	return err
}

func (p *platform) nestedKey() (string, error) {
	key, err := p.pairKey(p.accel)
	return "guests in " + key + " | " + p.boot.nestedHash, err
}

// tryNested boots a guest that is to run guests, unless it is known whether one
// can or it is not to be tried, and remembers the outcome. Its errors are the
// context's, and of remembering.
func (r *Runner) tryNested(ctx context.Context, p *platform) error {
	if p.boot.nested == nil || p.nested.Load() != nil {
		return nil
	}
	a := answer{Works: true, When: time.Now()}
	if err := r.bootOnce(ctx, p, machine{arch: p.arch, accel: p.accel, tscKHz: p.tscKHz, kvm: true}); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		a.Works, a.Reason = false, err.Error()
	}
	if p.nested.Store(&a); a.Works {
		r.cfg.Logger.Info("guests can run guests", "arch", p.arch.name, "accel", p.accel)
	} else {
		r.cfg.Logger.Warn("guests cannot run guests", "why", a.Reason)
	}
	key, err := p.nestedKey()
	if err == nil {
		err = r.answers.put(key, a)
	}
	return err
}

// canNest reports whether builds may run guests.
func (p *platform) canNest() bool {
	a := p.nested.Load()
	return a != nil && a.Works
}

// addNested makes the initramfs of guests that run guests.
func (b *bootFiles) addNested(dir string, of *base, init string) error {
	modules, err := loadModules(of.kernel.Modules, guestModules)
	if err != nil {
		return err
	}
	all, err := loadModules(of.kernel.Modules, of.arch.kvmModules)
	if err != nil {
		return err
	}
	// A kernel may have KVM built in; the folder for its modules is there all the
	// same, and tells the agent what the guest is for.
	nested := []module{}
	for _, m := range all {
		if !slices.ContainsFunc(modules, func(other module) bool { return other.name == m.name }) {
			nested = append(nested, m)
		}
	}
	b.nested, b.nestedHash, err = namelessFile(dir, func(w io.Writer) error {
		return writeInitrd(w, init, of.shell, modules, nested)
	})
	if err != nil {
		return fmt.Errorf("make initramfs: %w", err)
	}
	return nil
}
