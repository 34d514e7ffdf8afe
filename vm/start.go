package vm

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"nbd/vm/link"
	"nbd/vm/usernet"
)

// How long things may take before a guest is given up, with hardware; emulated
// guests get patienceTCG times as long.
const (
	bootPatience = 30 * time.Second // from start to hello, and restore to awake
	beatPatience = 6 * link.BeatInterval
	patienceTCG  = 10
)

// patience scales a time for an accelerator.
func patience(accel string, d time.Duration) time.Duration {
	if accel == "tcg" {
		d *= patienceTCG
	}
	return d / hurry
}

// hurry is more than 1 in tests of guests that hang.
var hurry time.Duration = 1

// guestCount makes the names of cgroups unique in this process.
var guestCount atomic.Int64

// errGuestEnded is why a guest's waits end when QEMU does.
var errGuestEnded = errors.New("the guest ended by itself")

// A guestVM is one running QEMU with what the host holds of it. Its context ends,
// and QEMU with it, when the caller's ends, when QEMU ends, or by close.
type guestVM struct {
	ctx     context.Context
	cancel  context.CancelCauseFunc
	machine machine

	proc    *process
	console *console
	group   cgroup // nil if there are none
	qmp     *qmp
	ctl     *link.Conn // on control
	control net.Conn
	log     net.Conn
	scratch *os.File
	network *usernet.Network // nil without
	// restored reports that it came from a template.
	restored bool

	cleanup []func() error // in reverse order
	// undead says that QEMU could not be ended: its user id is not given to
	// another guest.
	undead bool
}

// guestDisks are the disks of a guest beside its scratch disk.
type guestDisks struct {
	inputs *Disk
	sink   *Sink
	// network is what is reached; nil for no network.
	network *usernet.Config
}

// launch starts QEMU with its sockets, up to and including the QMP handshake. The
// scratch disk becomes the guest's. The guest must be closed.
func (r *Runner) launch(ctx context.Context, p *platform, m machine, how mode, ram, scratch *os.File, disks guestDisks, gets share) (_ *guestVM, err error) {
	g := &guestVM{machine: m, console: new(console), scratch: scratch}
	r.scratches.add(g.scratch)
	g.cleanup = append(g.cleanup, func() error { return r.scratches.remove(g.scratch) })
	g.ctx, g.cancel = context.WithCancelCause(ctx)
	defer func() {
		if err != nil {
			err = errors.Join(err, g.close())
		}
	}()
	uid, gid, err := g.takeIDs(r.ids)
	if err != nil {
		return nil, err
	}
	r.alive.Add(1)
	g.cleanup = append(g.cleanup, func() error { r.alive.Add(-1); return nil })
	if err := g.enterGroup(p.cgroups, gets.limitMiB); err != nil {
		return nil, err
	}
	if uid >= 0 {
		if err := g.scratch.Chown(uid, uid); err != nil {
			return nil, fmt.Errorf("make scratch disk: %w", err)
		}
	}
	initrd, _ := p.boot.initrdFor(m)
	sockets, args := fdSink-fdQMP+1, arguments(m, how)
	if disks.network != nil {
		sockets, args = sockets+1, append(args, netArguments()...)
	}
	ends, theirs, err := socketPairs(sockets)
	if err != nil {
		return nil, err
	}
	defer closeAll(theirs)
	g.serve(ends, disks, r.cfg.Logger)
	if disks.network != nil {
		if err := g.startNetwork(*disks.network, ends[fdNetwork-fdQMP]); err != nil {
			ends[0].Close()
			return nil, err
		}
	}
	err = g.startQEMU(r, command{
		path: p.qemu.Path, args: args, files: append([]*os.File{ram, p.boot.kernel, initrd, g.scratch}, theirs...),
		uid: uid, gid: gid, group: g.group, confine: r.confined, devices: devices(m), output: g.console,
	})
	if err != nil {
		ends[0].Close()
		return nil, err
	}
	closeAll(theirs)
	if err := g.greet(ends[0].(*net.UnixConn)); err != nil {
		return nil, err
	}
	return g, nil
}

// takeIDs gives QEMU a user id of its own, and the group that may use KVM if it
// does.
func (g *guestVM) takeIDs(all *ids) (uid, gid int, err error) {
	uid, release, err := all.take()
	if err != nil {
		return 0, 0, err
	}
	g.cleanup = append(g.cleanup, func() error {
		if !g.undead {
			release()
		}
		return nil
	})
	gid = uid
	if g.machine.accel == "kvm" {
		gid, err = kvmGroup(uid)
	}
	return uid, gid, err
}

// startQEMU starts the guest's process.
func (g *guestVM) startQEMU(r *Runner, c command) (err error) {
	if g.proc, err = startProcess(c); err != nil {
		g.undead = errors.Is(err, errUndead)
		return fmt.Errorf("%w%s", err, g.console.summary())
	}
	gone := r.processes.add(g.proc.cmd.Process.Pid)
	g.cleanup = append(g.cleanup, func() error { gone(); return nil })
	// What waits for the guest stops waiting when QEMU ends, and QEMU ends when
	// the caller does not want it any more.
	go func() {
		select {
		case <-g.proc.done:
			g.cancel(errGuestEnded)
		case <-g.ctx.Done():
			g.proc.kill()
		}
	}()
	return nil
}

// greet waits for QEMU's first words on its control socket.
func (g *guestVM) greet(socket *net.UnixConn) (err error) {
	ctx, stop := g.within(g.ctx, bootPatience, "QEMU did not start in time")
	defer stop()
	if g.qmp, err = newQMP(ctx, socket); err != nil {
		return g.explain(fmt.Errorf("talk to QEMU: %w", err))
	}
	g.cleanup = append(g.cleanup, func() error { g.qmp.close(); return nil })
	return nil
}

// enterGroup makes the guest's cgroup.
func (g *guestVM) enterGroup(f cgroupFactory, limitMiB int) error {
	if f == nil {
		return nil
	}
	group, err := f.create(cgroupName(os.Getpid(), guestCount.Add(1)), limitMiB)
	if err != nil {
		return err
	}
	g.group = group
	g.cleanup = append(g.cleanup, group.destroy)
	return nil
}

// serve connects the host's ends of a guest's sockets, in the order of their
// descriptors.
func (g *guestVM) serve(ends []net.Conn, disks guestDisks, logger *slog.Logger) {
	at := func(fd int) net.Conn { return ends[fd-fdQMP] }
	g.ctl, g.control, g.log = link.Host(at(fdControl)), at(fdControl), at(fdLog)
	in := disks.inputs.Serve(oneConn(at(fdInputs)), logger)
	out := disks.sink.Serve(oneConn(at(fdSink)), logger)
	g.cleanup = append(g.cleanup, func() error {
		closeAll([]net.Conn{at(fdControl), at(fdLog)})
		return nil
	}, in.Close, out.Close)
}

// close kills the guest, waits until nothing of it is left and returns what
// could not be removed.
func (g *guestVM) close() error {
	g.cancel(context.Canceled)
	var errs []error
	if g.proc != nil {
		errs = append(errs, g.proc.stop())
		g.undead = errs[0] != nil
	}
	for i := len(g.cleanup) - 1; i >= 0; i-- {
		errs = append(errs, g.cleanup[i]())
	}
	g.cleanup = nil
	return errors.Join(errs...)
}

// explain adds to an error what is known of the guest's end.
func (g *guestVM) explain(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, errQMPClosed) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) {
		// QEMU's sockets close a moment before it has ended.
		select {
		case <-g.proc.done:
		case <-time.After(2 * time.Second):
		}
	}
	select {
	case <-g.proc.done:
		return fmt.Errorf("%w (QEMU: %s%s)", err, g.proc.exit(), g.console.summary())
	default:
		return fmt.Errorf("%w%s", err, g.console.summary())
	}
}

// receive waits for a message of the guest.
func (g *guestVM) receive(ctx context.Context) (link.Message, error) {
	type received struct {
		m   link.Message
		err error
	}
	got := make(chan received, 1)
	go func() {
		m, err := g.ctl.Receive()
		got <- received{m, err}
	}()
	select {
	case r := <-got:
		return r.m, r.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// send sends a message to the guest, which may not take it.
func (g *guestVM) send(ctx context.Context, m link.Message) error {
	stop := context.AfterFunc(ctx, func() { g.control.Close() })
	defer stop()
	err := g.ctl.Send(m)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// hello waits until a guest has booted.
func (g *guestVM) hello(ctx context.Context) (*link.Hello, error) {
	ctx, stop := g.within(ctx, bootPatience, "the guest did not boot in time")
	defer stop()
	m, err := g.receive(ctx)
	if err != nil {
		return nil, g.explain(fmt.Errorf("boot guest: %w", err))
	}
	h, ok := m.(*link.Hello)
	if !ok || h.Version != link.Version {
		return nil, fmt.Errorf("boot guest: its agent said %T and not hello", m)
	}
	if g.machine.kvm && !slices.Contains(h.Features, link.FeatureKVM) {
		return nil, g.explain(errors.New("boot guest: no virtual machine can be made in it"))
	}
	return h, nil
}

// wake gives the guest what it must not share with its siblings, and so many
// processors if it gets them on demand.
func (g *guestVM) wake(ctx context.Context, cpus int) error {
	ctx, stop := g.within(ctx, bootPatience, "the guest did not wake in time")
	defer stop()
	w := &link.Wake{Entropy: make([]byte, link.MinEntropy)}
	rand.Read(w.Entropy)
	if g.machine.onDemand {
		w.CPUs = cpus
	}
	w.Time = time.Now().UnixNano()
	if err := g.send(ctx, w); err != nil {
		return g.explain(fmt.Errorf("wake guest: %w", err))
	}
	m, err := g.receive(ctx)
	if err != nil {
		return g.explain(fmt.Errorf("wake guest: %w", err))
	}
	if _, ok := m.(*link.Awake); !ok {
		return fmt.Errorf("wake guest: its agent said %T and not awake", m)
	}
	return nil
}

// within bounds a wait for the guest, and ends it with the guest.
func (g *guestVM) within(ctx context.Context, d time.Duration, late string) (context.Context, func()) {
	ctx, end := context.WithCancelCause(ctx)
	stop := context.AfterFunc(g.ctx, func() { end(context.Cause(g.ctx)) })
	ctx, cancel := context.WithTimeoutCause(ctx, patience(g.machine.accel, d), errors.New(late))
	return ctx, func() { stop(); cancel(); end(nil) }
}

// restore fills a guest that was started as a clone and lets it run.
func (g *guestVM) restore(ctx context.Context, state *os.File) error {
	if _, err := state.Seek(0, 0); err != nil {
		return fmt.Errorf("read saved guest: %w", err)
	}
	ctx, stop := g.within(ctx, bootPatience, "the guest was not restored in time")
	defer stop()
	if err := g.qmp.migrate(ctx, "migrate-incoming", state); err != nil {
		return g.explain(fmt.Errorf("restore guest: %w", err))
	}
	if err := g.qmp.do(ctx, "cont", nil, nil, nil); err != nil {
		return g.explain(fmt.Errorf("restore guest: %w", err))
	}
	return nil
}

// scratchFile makes the scratch disk of a guest: fill fills an empty file. The file
// has no name when it returns, so that nothing is left of it when it is closed.
func (r *Runner) scratchFile(fill func(*os.File) error) (_ *os.File, err error) {
	f, err := os.CreateTemp(r.cfg.RuntimeDir, scratchPrefix)
	if err != nil {
		return nil, fmt.Errorf("make scratch disk: %w", err)
	}
	if err := errors.Join(os.Remove(f.Name()), fill(f)); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// socketPairs makes n connected pairs of sockets. The first of each is the
// host's.
func socketPairs(n int) (ours []net.Conn, theirs []*os.File, err error) {
	defer func() {
		if err != nil {
			closeAll(theirs)
			closeAll(ours)
		}
	}()
	for range n {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return ours, theirs, fmt.Errorf("make socket: %w", err)
		}
		theirs = append(theirs, os.NewFile(uintptr(fds[1]), "guest"))
		host := os.NewFile(uintptr(fds[0]), "host")
		conn, err := net.FileConn(host) // a duplicate
		host.Close()
		if err != nil {
			return ours, theirs, fmt.Errorf("make socket: %w", err)
		}
		ours = append(ours, conn)
	}
	return ours, theirs, nil
}

func closeAll[T interface{ Close() error }](all []T) {
	for _, c := range all {
		// Sockets and duplicates of descriptors: there is nothing to lose, and
		// some were closed before.
		_ = c.Close()
	}
}

// A connListener hands out one connection, and then waits to be closed.
type connListener struct {
	conn   chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func oneConn(c net.Conn) net.Listener {
	l := &connListener{conn: make(chan net.Conn, 1), closed: make(chan struct{})}
	l.conn <- c
	return l
}

func (l *connListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conn:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *connListener) Close() error {
	l.once.Do(func() {
		close(l.closed)
		select {
		case c := <-l.conn:
			c.Close()
		default:
		}
	})
	return nil
}

func (l *connListener) Addr() net.Addr { return &net.UnixAddr{Name: "socketpair", Net: "unix"} }
