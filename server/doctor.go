package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"nbd/server/adminapi"
	"nbd/vm"
)

// bootDeadline bounds the doctor's boot; under emulation a cold boot takes
// some seconds, on a busy machine many.
const bootDeadline = 5 * time.Minute

// Doctor looks at each thing that a build needs and boots a guest, telling on
// w what it finds and how to mend what is wrong. Its error says that something
// is.
func Doctor(ctx context.Context, guests vm.Config, w io.Writer) error {
	d := &doctor{w: w}
	d.state(guests.StateDir)
	d.server(ctx, guests.StateDir)
	d.guests(ctx, guests)
	if d.wrong > 0 {
		return fmt.Errorf("what is wrong: %d of the above", d.wrong)
	}
	return nil
}

type doctor struct {
	w     io.Writer
	wrong int
}

func (d *doctor) ok(what, text string)   { fmt.Fprintf(d.w, "ok    %-8s %s\n", what, text) }
func (d *doctor) off(what, text string)  { fmt.Fprintf(d.w, "off   %-8s %s\n", what, text) }
func (d *doctor) weak(what, text string) { fmt.Fprintf(d.w, "weak  %-8s %s\n", what, text) }

func (d *doctor) bad(what string, err error, hint string) {
	d.wrong++
	fmt.Fprintf(d.w, "FAIL  %-8s %v\n", what, err)
	if hint != "" {
		fmt.Fprintf(d.w, "      %-8s → %s\n", "", hint)
	}
}

// state looks whether the state directory can be written.
func (d *doctor) state(dir string) {
	err := os.MkdirAll(dir, 0o755)
	if err == nil {
		var f *os.File
		if f, err = os.CreateTemp(dir, ".doctor-*"); err == nil {
			err = errors.Join(f.Close(), os.Remove(f.Name()))
		}
	}
	if err != nil {
		d.bad("state", err, "run as the user that runs `nbd serve`, or name another directory with --state")
		return
	}
	d.ok("state", dir)
}

// server asks the running server, if there is one.
func (d *doctor) server(ctx context.Context, dir string) {
	s, err := adminapi.NewClient(dir).Status(ctx)
	var hint *adminapi.HintError
	switch {
	case err == nil:
		d.ok("server", fmt.Sprintf("nbd %s listens on %s; %d accounts", s.Version, s.SSH, s.Store.Accounts))
		if s.Store.Accounts == 0 {
			d.weak("accounts", "nobody can log in → nbd admin account add NAME --ssh-key FILE")
		}
	case errors.As(err, &hint):
		d.weak("server", fmt.Sprintf("%v → %s", err, hint.Hint))
	default:
		d.bad("server", err, "see the log of `nbd serve`")
	}
}

// guests boots one, in a directory of its own, so that a running server is not
// disturbed.
func (d *doctor) guests(ctx context.Context, cfg vm.Config) {
	cfg.RuntimeDir = filepath.Join(cfg.StateDir, fmt.Sprintf("doctor-%d", os.Getpid()))
	defer os.RemoveAll(cfg.RuntimeDir)
	r, err := vm.New(cfg)
	var missing *vm.MissingError
	if errors.As(err, &missing) {
		d.bad("guests", errors.New(missing.What), missing.Hint)
		return
	}
	if err != nil {
		d.bad("guests", err, "")
		return
	}
	defer r.Close()
	s := r.Status()
	d.ok("qemu", fmt.Sprintf("%s (%s)", s.QEMU, s.QEMUPath))
	d.ok("kernel", fmt.Sprintf("%s (%s)", s.Kernel, s.KernelPath))
	d.ok("shell", s.Busybox)
	ctx, cancel := context.WithTimeout(ctx, bootDeadline)
	defer cancel()
	start := time.Now()
	s, err = r.Qualify(ctx, true)
	if errors.As(err, &missing) {
		d.bad("boot", errors.New(missing.What), missing.Hint)
		return
	}
	if err != nil {
		d.bad("boot", err, "try another kernel with `nbd kernel import`")
		return
	}
	d.ok("boot", fmt.Sprintf("guests boot under %s; trying them took %.1f s", s.Accel, time.Since(start).Seconds()))
	if s.WhyNotKVM != "" {
		d.weak("kvm", s.WhyNotKVM+"; builds run under emulation, many times slower")
	}
	d.offered(s)
	for _, w := range s.Weaknesses {
		d.weak("safety", w)
	}
}

// offered tells what builds may ask for, and why not for more.
func (d *doctor) offered(s vm.Status) {
	for _, system := range s.Systems {
		switch {
		case system.Offered:
			d.ok("system", fmt.Sprintf("%s: %s, kernel %s, QEMU %s", system.Name, system.Accel, system.Kernel, system.QEMU))
		case system.Broken:
			d.bad("system", errors.New(system.Name+": "+system.WhyNot), "try another kernel with `nbd kernel import`")
		default:
			d.off("system", system.Name+": "+system.WhyNot)
		}
	}
	for _, f := range s.Features {
		if f.Offered {
			d.ok("feature", f.Name+": a build user's virtual machine could be made in a guest")
		} else {
			d.off("feature", f.Name+": "+f.WhyNot)
		}
	}
}
