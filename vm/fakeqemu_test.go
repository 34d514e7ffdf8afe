package vm

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"nbd/vm/link"
)

// A fake QEMU is this test program under another name: it answers QMP, has no
// guest, and plays what a guest's agent says itself. All that is on the host's
// side of it is real: its user, confinement, cgroup, disks and sockets. What it
// plays is named in its own name, or in the environment of the build.

// fakeQEMUPrefix begins the name of a fake QEMU; what it plays from its start on
// follows, if that is not an agent that boots. The QEMU of another architecture
// lies beside it and boots.
const fakeQEMUPrefix = "fakeqemu-"

// A fakeGuest is what the program that plays a guest has.
type fakeGuest struct {
	qmp, ctl, log net.Conn
	agent         *link.Conn
	inputs, sink  *nbdClient
}

// fakeQEMUMain is the main function. Its QEMU runs until it is killed, like a
// machine that nobody turns off.
func fakeQEMUMain() {
	if len(os.Args) == 2 && os.Args[1] == "--version" {
		fmt.Println("QEMU emulator version 7.2.22 (of a test)")
		os.Exit(0)
	}
	g, err := newFakeGuest()
	if err != nil {
		fmt.Fprintln(os.Stderr, "fake QEMU:", err)
		os.Exit(1)
	}
	play := fakeStarts[strings.TrimPrefix(filepath.Base(os.Args[0]), fakeQEMUPrefix)]
	if play == nil {
		play = (*fakeGuest).build
	}
	play(g)
	// Go ends a program in which nothing can happen any more.
	for {
		time.Sleep(time.Hour)
	}
}

// build plays an honest agent that is given a build, and then what that says.
func (g *fakeGuest) build() {
	go g.answerQMP()
	order, err := g.boot()
	if err != nil {
		fmt.Fprintln(os.Stderr, "fake QEMU:", err)
		os.Exit(1)
	}
	for _, e := range order.Env {
		if play, ok := strings.CutPrefix(string(e), "play="); ok {
			fakePlays[play](g)
		}
	}
}

// newFakeGuest takes over the inherited sockets.
func newFakeGuest() (*fakeGuest, error) {
	conns := map[int]net.Conn{}
	for fd := fdQMP; fd <= fdSink; fd++ {
		f := os.NewFile(uintptr(fd), "socket")
		c, err := net.FileConn(f)
		if err != nil {
			return nil, err
		}
		f.Close()
		conns[fd] = c
	}
	g := &fakeGuest{qmp: conns[fdQMP], ctl: conns[fdControl], log: conns[fdLog], agent: link.Guest(conns[fdControl])}
	disk := func(fd int) *nbdClient {
		return &nbdClient{conn: conns[fd], r: bufio.NewReader(conns[fd]), waiting: make(map[uint64]*nbdCall)}
	}
	g.inputs, g.sink = disk(fdInputs), disk(fdSink)
	return g, nil
}

// answerQMP agrees to everything.
func (g *fakeGuest) answerQMP() {
	fmt.Fprintln(g.qmp, `{"QMP": {"version": {}, "capabilities": []}}`)
	for lines := bufio.NewScanner(g.qmp); lines.Scan(); {
		if strings.Contains(lines.Text(), "query-status") {
			fmt.Fprintln(g.qmp, `{"return": {"status": "running"}}`)
		} else {
			fmt.Fprintln(g.qmp, `{"return": {}}`)
		}
	}
}

// boot plays an honest agent up to the order.
func (g *fakeGuest) boot() (*link.BuildOrder, error) {
	if err := g.agent.Send(&link.Hello{Version: link.Version, Kernel: "6.1.0-fake"}); err != nil {
		return nil, err
	}
	for {
		m, err := g.agent.Receive()
		if err != nil {
			return nil, err
		}
		switch m := m.(type) {
		case *link.Wake:
			if err := g.agent.Send(&link.Awake{}); err != nil {
				return nil, err
			}
		case *link.BuildOrder:
			return m, nil
		}
	}
}

// say sends messages.
func (g *fakeGuest) say(all ...link.Message) {
	for _, m := range all {
		if g.agent.Send(m) != nil {
			return // the host has had enough
		}
	}
}

// connect begins the use of a disk.
func (g *fakeGuest) connect(c *nbdClient) *nbdClient {
	if err := c.hello(3); err != nil {
		return c
	}
	if _, err := c.option(nbdOptGo, goData("", nbdInfoBlockSize)); err == nil {
		go c.receive()
	}
	return c
}

// succeed plays the end of a build whose output is nar, of which it tells size.
func (g *fakeGuest) succeed(nar []byte, size int64) {
	if g.connect(g.sink).write(aligned(nar), 0) != nil {
		return
	}
	g.say(&link.Outputs{Outputs: []link.OutputInfo{{Name: "out", Size: size}}}, &link.Result{Kind: link.Exited})
}

// flood writes b to w for ever.
func flood(w io.Writer, b []byte) {
	for {
		if _, err := w.Write(b); err != nil {
			return
		}
	}
}

// frame is a frame with that body, whose length is told to be n.
func frame(n uint32, body string) []byte {
	return append(binary.LittleEndian.AppendUint32(nil, n), body...)
}

// hasten has guests that hang be given up sooner, for the time of a test.
func hasten(t testing.TB, times time.Duration) {
	old := hurry
	hurry = times
	t.Cleanup(func() { hurry = old })
}

// fakeProgram is this program in a folder that the users of guests can reach.
func fakeProgram(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	for up := dir; up != os.TempDir() && up != "/"; up = filepath.Dir(up) {
		if err := os.Chmod(up, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(dir, "program")
	if err := os.WriteFile(program, self, 0o755); err != nil {
		t.Fatal(err)
	}
	return program
}

// newFakeRunner returns a Runner whose QEMUs are the fake program, with what they
// play in their name.
func newFakeRunner(t testing.TB, program, start string, blobs Blobs) *Runner {
	t.Helper()
	name := filepath.Join(filepath.Dir(program), fakeQEMUPrefix+start)
	if err := os.Link(program, name); err != nil {
		t.Fatal(err)
	}
	init, err := testInit()
	if err != nil {
		t.Fatal(err)
	}
	state := t.TempDir()
	writeFiles(t, state, map[string][]byte{"kernels/6.1.0-fake/vmlinuz": bzImage("6.1.0-fake"), filepath.Join("kernels/6.1.0-fake", importedFiles, "none"): nil})
	r, err := New(Config{StateDir: state, Blobs: blobs, Accel: "tcg", QEMU: name, Kernel: "6.1.0-fake", Binary: init,
		Busybox: init, ColdBoot: true, MaxOutput: 1 << 20,
		Logger: slog.New(slog.NewTextHandler(leftovers{t}, &slog.HandlerOptions{Level: slog.LevelError}))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		left, err := os.ReadDir(r.cfg.RuntimeDir)
		if err != nil || len(left) > 0 {
			t.Errorf("left of the guests: %v, %v", left, err)
		}
	})
	return r
}

// leftovers is where a Runner of a test logs. That something of a guest could not
// be removed is a failure.
type leftovers struct{ t testing.TB }

func (l leftovers) Write(p []byte) (int, error) {
	if bytes.Contains(p, []byte("remove guest")) {
		l.t.Errorf("%s", p)
	}
	return len(p), nil
}
