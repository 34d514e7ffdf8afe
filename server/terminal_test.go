package server

import (
	"context"
	"io"
	"strings"
	"testing"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"nbd/store"
)

// A typist sits at a terminal with a shell.
type typist struct {
	*gossh.Session
	t   *testing.T
	in  io.Writer
	out *screen
}

// A screen keeps what was written to it; text is awaited from where the last
// one ended.
type screen struct {
	syncBuffer
	changed chan struct{}
	seen    int
}

// Write implements io.Writer.
func (s *screen) Write(p []byte) (int, error) {
	n, err := s.syncBuffer.Write(p)
	select {
	case s.changed <- struct{}{}:
	default:
	}
	return n, err
}

// sit opens a shell on a terminal; command is "" for a session without one.
func (ts *testServer) sit(t *testing.T, command string) *typist {
	t.Helper()
	s, err := ts.dial(ts.alice).NewSession()
	if err != nil {
		t.Fatal(err)
	}
	p := &typist{Session: s, t: t, out: &screen{changed: make(chan struct{}, 1)}}
	s.Stdout, s.Stderr = p.out, p.out
	if p.in, err = s.StdinPipe(); err == nil {
		err = s.RequestPty("xterm", 24, 80, gossh.TerminalModes{})
	}
	if err == nil && command == "" {
		err = s.Shell()
	} else if err == nil {
		err = s.Start(command)
	}
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *typist) types(text string) {
	p.t.Helper()
	if _, err := io.WriteString(p.in, text); err != nil {
		p.t.Fatal(err)
	}
}

// sees waits for text, and returns what came before it.
func (p *typist) sees(text string) string {
	p.t.Helper()
	deadline := time.After(patience)
	for {
		all := p.out.String()
		if i := strings.Index(all[p.out.seen:], text); i >= 0 {
			before := all[p.out.seen : p.out.seen+i]
			p.out.seen += i + len(text)
			return before
		}
		select {
		case <-p.out.changed:
		case <-deadline:
			p.t.Fatalf("no %q in %q", text, all[p.out.seen:])
		}
	}
}

// leaves waits for the shell's end and returns its exit status.
func (p *typist) leaves() int {
	p.t.Helper()
	return (&pipe{Session: p.Session}).status(p.t)
}

func TestTerminal(t *testing.T) {
	ts := newTestServer(t, nil)
	p := ts.sit(t, "")
	p.sees("account alice")
	p.sees("nbd> ")
	p.types("settings timeout --set 7\r")
	p.sees("\r\n")
	p.sees("nbd> ")
	p.types("settings tim\t --show\r") // completed
	p.sees("settings timeout")
	p.sees("\r\n7\r\n")
	p.sees("nbd> ")
	p.types("\x1b[A\r") // the line before
	p.sees("\r\n7\r\n")
	p.sees("nbd> ")
	p.types("nonsense")
	p.types("\x03usage\r") // ctrl-C clears the line
	p.sees("CPU time")
	p.sees("nbd> ")
	p.types("bu\t\tsh\t\r")
	p.sees("summary") // a list of what fits
	p.sees("usage: builds show ID\r\n")
	p.sees("nbd> ")
	if err := p.WindowChange(50, 40); err != nil {
		t.Fatal(err)
	}
	p.types(strings.Repeat("x", 100) + "\r")
	p.sees("there is no command")
	p.sees("nbd> ")
	p.types("'open\r")
	p.sees("quote without end")
	p.types("\x04")
	if status := p.leaves(); status != 0 {
		t.Errorf("ctrl-D: status %d", status)
	}
	p = ts.sit(t, "shell")
	p.sees("nbd> ")
	p.types("exit\r")
	if status := p.leaves(); status != 0 {
		t.Errorf("exit: status %d", status)
	}
}

// TestFollow: a log that is being written is shown as it comes, without what
// would control the terminal, and ctrl-C ends it alone.
func TestFollow(t *testing.T) {
	ts := newTestServer(t, nil)
	b := ts.addBuild(ts.account.ID, func(b *store.Build) { b.Status, b.Stopped = store.StatusRunning, time.Time{} })
	log, err := ts.store.CreateBuildLog(context.Background(), b.ID)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	write := func(text string) {
		t.Helper()
		if _, err := io.WriteString(log, text); err != nil {
			t.Fatal(err)
		}
	}
	write("first\n")
	p := ts.sit(t, "shell")
	p.sees("nbd> ")
	p.types("builds log 1\r")
	p.sees("first\r\n")
	write("\x1b[31mred\x1b[0m \x1b[2J\x1b]0;title\a\n")
	p.sees("\x1b[31mred\x1b[0m \\x1b[2J\\x1b]0;title\\x07\r\n")
	p.types("\x03")
	p.sees("nbd> ")
	p.types("usage\r")
	p.sees("CPU time")

	single := ts.sit(t, "shell builds log 1")
	single.sees("title\\x07\r\n")
	single.types("\x03")
	if status := single.leaves(); status != exitInterrupted {
		t.Errorf("ctrl-C: status %d", status)
	}

	// On a pipe the bytes are as they were written.
	if err := log.Close(); err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"shell builds log 1", "api builds log 1"} {
		if out, errs, status := ts.command(ts.alice, line, ""); out != "first\n\x1b[31mred\x1b[0m \x1b[2J\x1b]0;title\a\n" || status != 0 {
			t.Errorf("%s: %d %q %q", line, status, out, errs)
		}
	}
}

// TestHostileTerminal: what a client types, or how large it says that its
// terminal is, ends its own shell at most.
func TestHostileTerminal(t *testing.T) {
	ts := newTestServer(t, nil)
	p := ts.sit(t, "shell")
	p.sees("nbd> ")
	for _, size := range [][2]int{{0, 0}, {1, 1}, {1 << 30, 1 << 30}, {4096, 1}} {
		if err := p.WindowChange(size[0], size[1]); err != nil {
			t.Fatal(err)
		}
	}
	p.types("\xff\xfe\x00\x80 usage\x15usage\r")
	p.sees("CPU time")
	p.types("\x1b[" + strings.Repeat("1", 5000)) // a key without end
	if status := p.leaves(); status != exitError {
		t.Errorf("a key without end: status %d", status)
	}
	s, err := ts.dial(ts.alice).NewSession()
	if err != nil {
		t.Fatal(err)
	}
	if ok, err := s.SendRequest("pty-req", true, []byte("junk")); ok || err != nil {
		t.Errorf("a malformed request for a terminal: %t, %v", ok, err)
	}
	if ok, err := s.SendRequest("window-change", true, []byte("junk")); ok || err != nil {
		t.Errorf("window-change without a terminal: %t, %v", ok, err)
	}
}
