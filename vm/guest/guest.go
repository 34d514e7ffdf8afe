// Package guest is what runs inside a guest: its init, which does what the
// host says on the control port (package link), and the sandbox in which the
// builder runs.
//
// # Life
//
// The kernel starts the nbd binary as /init. Main mounts what it needs, loads
// the modules that the host packed beside it, leaves the initramfs for a tmpfs
// (pivot_root does not work on an initramfs) and says hello. A template is saved
// at that point, so everything before is common to all guests made from it, and
// nothing before may depend on randomness or time. By then the scratch disk is
// mounted, of which each clone has a copy, too, and the sandbox is put together as
// far as it is the same for all builds. A wake brings randomness and time; until
// then /proc/sys/kernel/random/boot_id is not read, and a build is refused. A guest
// runs one build and is killed.
//
// # The sandbox
//
// A builder sees what it sees in the sandbox of Nix on Linux, with a user
// namespace: uid 1000 and gid 100 are mapped and nothing else, so that what
// belongs to root is shown as nobody's. The root directory is made on the
// scratch disk by the agent (root.go), the first process of the namespaces
// assembles it and becomes the builder (sandbox.go). Store objects are bound one
// by one, as Nix does, and not overlaid: hard links and renames from an input
// into an output fail as they do there, and nothing is ever copied up.
//
// What was learned about Nix's sandbox comes from its source, version 2.34
// (src/libstore/unix/build), and from builds that printed what they saw.
package guest

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"nbd/vm/link"
)

// Enter becomes what this program is in a guest: its init, or what a name of its
// own (link) says. Where it is nothing of that, it returns at once.
func Enter() {
	switch {
	case os.Getpid() == 1 && os.Args[0] == link.InitPath:
		Main()
	case os.Args[0] == link.SandboxArg0:
		Sandbox()
	case os.Args[0] == link.BuiltinArg0:
		Builtin()
	case os.Args[0] == link.KVMProbeArg0:
		probeKVM()
	}
}

// Main is the life of the guest's PID 1. It never returns: when the agent
// cannot go on, it says why on the console and resets the machine, which ends
// QEMU.
func Main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "nbd guest:", err)
	}
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART); err != nil {
		fmt.Fprintln(os.Stderr, "nbd guest: reset machine:", err)
	}
	// PID 1 may not end.
	select {}
}

// run boots and serves the host. It returns only with an error.
func run() error {
	runsGuests, err := boot()
	if err != nil {
		return fmt.Errorf("boot guest: %w", err)
	}
	ctl, err := openPort(link.ControlPort)
	if err != nil {
		return err
	}
	log, err := openPort(link.LogPort)
	if err != nil {
		return err
	}
	a := &agent{conn: link.Guest(ctl), log: log, woken: make(chan struct{})}
	if a.kit, err = newKit(); err != nil {
		return fmt.Errorf("prepare for a build: %w", err)
	}
	if runsGuests && tryKVM() {
		a.features = append(a.features, link.FeatureKVM)
	}
	go a.beat()
	if err := a.hello(); err != nil {
		return err
	}
	return a.serve()
}

// An agent serves the host of one guest.
type agent struct {
	conn *link.Conn
	log  *port
	kit  *kit
	used atomic.Pointer[link.Usage] // by the build so far

	// features are what hello tells.
	features []string

	woken chan struct{} // closed by the first wake

	// The fields below belong to serve's goroutine.
	awake bool
	build *build // nil before the order
}

func (a *agent) hello() error {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return fmt.Errorf("uname: %w", err)
	}
	return a.conn.Send(&link.Hello{Version: link.Version, Kernel: unix.ByteSliceToString(uts.Release[:]), Features: a.features})
}

// serve does what the host asks until the connection is of no use any more.
func (a *agent) serve() error {
	for {
		m, err := a.conn.Receive()
		if err != nil {
			return fmt.Errorf("listen to host: %w", err)
		}
		if err := a.handle(m); err != nil {
			return err
		}
	}
}

func (a *agent) handle(m link.Message) error {
	switch m := m.(type) {
	case *link.Wake:
		if err := wake(m); err != nil {
			return fmt.Errorf("wake: %w", err)
		}
		if !a.awake {
			a.awake = true
			close(a.woken)
		}
		return a.conn.Send(&link.Awake{})
	case *link.BuildOrder:
		if !a.awake {
			return errors.New("build ordered before wake")
		}
		if a.build != nil {
			return errors.New("second build ordered")
		}
		a.build = &build{kit: a.kit, order: m, conn: a.conn, log: a.log, used: &a.used}
		go a.runBuild(a.build)
		return nil
	}
	return fmt.Errorf("host sent %T", m)
}

// runBuild runs a build and sends its result. The host kills the guest then.
func (a *agent) runBuild(b *build) {
	if err := a.conn.Send(b.run()); err != nil {
		fmt.Fprintln(os.Stderr, "nbd guest:", err)
	}
}

// beat tells the host, from a thread of its own, that the guest is alive since it
// was woken, and what its build has used so far. It ends when the host does not
// listen any more.
func (a *agent) beat() {
	runtime.LockOSThread()
	<-a.woken
	for range time.Tick(link.BeatInterval) {
		if err := a.conn.Send(&link.Beat{Usage: a.used.Load()}); err != nil {
			fmt.Fprintln(os.Stderr, "nbd guest:", err)
			return
		}
	}
}
