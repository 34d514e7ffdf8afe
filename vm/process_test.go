package vm

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// inPath returns the path of a plain program that stands in for QEMU.
func inPath(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func TestProcess(t *testing.T) {
	for _, tt := range []struct {
		name, program string
		args          []string
		kill          bool
		exit, output  string
	}{
		{name: "success", program: "true", exit: "exit status 0"},
		{name: "failure", program: "false", exit: "exit status 1"},
		{name: "killed", program: "sleep", args: []string{"100"}, kill: true, exit: "signal: killed"},
		{name: "killed by itself", program: "sh", args: []string{"-c", "kill -SEGV $$"}, exit: "signal: segmentation fault"},
		{name: "output", program: "sh", args: []string{"-c", "echo a; echo b >&2"}, exit: "exit status 0", output: "a|b"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var c console
			p, err := startProcess(command{path: inPath(t, tt.program), args: tt.args, uid: -1, output: &c})
			if err != nil {
				t.Fatal(err)
			}
			if tt.kill {
				p.kill()
			}
			<-p.done
			if !strings.HasPrefix(p.exit(), tt.exit) {
				t.Errorf("exit %q, want %q", p.exit(), tt.exit)
			}
			if got := strings.Join(c.lines(10), "|"); got != tt.output {
				t.Errorf("output %q, want %q", got, tt.output)
			}
			p.stop() // of an ended process is harmless
		})
	}
}

func TestProcessNotFound(t *testing.T) {
	_, err := startProcess(command{path: "/nonexistent/qemu", uid: -1})
	if !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v, want not exist", err)
	}
}

func TestProcessInheritsFilesAndNothingElse(t *testing.T) {
	t.Setenv("NBD_SECRET", "leaks")
	f, err := memfd("test", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString("from the file\n"); err != nil {
		t.Fatal(err)
	}
	var c console
	p, err := startProcess(command{
		path: inPath(t, "sh"), args: []string{"-c", "cat /proc/self/fd/3; env; id -u; id -g; id -G; pwd"},
		files: []*os.File{f}, uid: -1, output: &c,
	})
	if err != nil {
		t.Fatal(err)
	}
	<-p.done
	out := strings.Join(c.lines(20), "\n")
	if !strings.HasPrefix(out, "from the file\n") || strings.Contains(out, "leaks") {
		t.Errorf("output %q", out)
	}
}

// Only root can do without being the server's user; elsewhere the refusal is
// what is tested.
func TestProcessUser(t *testing.T) {
	var c console
	ids, err := newIDs(64000, 2)
	if err != nil {
		if os.Geteuid() == 0 && !strings.Contains(err.Error(), "namespace") {
			t.Errorf("root without users: %v", err)
		}
		if id, _, err := ids.take(); id != -1 || err != nil {
			t.Errorf("take: %d, %v", id, err)
		}
		return
	}
	id, release, err := ids.take()
	if err != nil {
		t.Fatal(err)
	}
	p, err := startProcess(command{path: inPath(t, "sh"), args: []string{"-c", "id -u; id -g; id -G; grep CapEff /proc/self/status"},
		uid: id, gid: id, output: &c})
	if err != nil {
		t.Fatal(err)
	}
	<-p.done
	if got, want := strings.Join(c.lines(10), " "), "64000 64000 64000 CapEff:0000000000000000"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if second, _, err := ids.take(); err != nil || second != 64001 {
		t.Errorf("second id %d, %v", second, err)
	}
	if _, _, err := ids.take(); err == nil {
		t.Error("a third id of two")
	}
	release()
	if again, _, err := ids.take(); err != nil || again != 64000 {
		t.Errorf("id given back: %d, %v", again, err)
	}
}

func TestIDsMapped(t *testing.T) {
	for _, tt := range []struct {
		table string
		want  bool
	}{
		{"         0          0 4294967295\n", true},
		{"         0     100000      65536\n", true},
		{"         0     100000      64000\n", false},
		{"         0       1000          1\n         1     100000      65535\n", true},
		{"", false},
		{"junk", false},
	} {
		if got := idsMapped(tt.table, 64000, 256); got != tt.want {
			t.Errorf("%q: %v", tt.table, got)
		}
	}
}

func TestDeviceGroup(t *testing.T) {
	for _, tt := range []struct {
		id    int
		mode  os.FileMode
		group int
		want  int // 0: none
	}{
		{64000, 0o666, 0, 64000},
		{64000, 0o660, 104, 104},
		{64000, 0o660, 0, 0},
		{64000, 0o600, 104, 0},
		{-1, 0o600, 0, -1},
	} {
		got, err := deviceGroup(tt.id, tt.mode, tt.group)
		if got != tt.want || (err == nil) != (tt.want != 0) {
			t.Errorf("%+v: %d, %v", tt, got, err)
		}
	}
}

// The server's end is its guests' end: a child of a killed process dies. The
// test runs itself as that process.
func TestProcessDiesWithServer(t *testing.T) {
	if os.Getenv("NBD_TEST_SERVER") != "" {
		p, err := startProcess(command{path: inPath(t, "sleep"), args: []string{"1000"}, uid: -1})
		if err != nil {
			t.Fatal(err)
		}
		os.Stdout.WriteString("pid " + strconv.Itoa(p.pid()) + "\n")
		select {}
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestProcessDiesWithServer$")
	cmd.Env = append(os.Environ(), "NBD_TEST_SERVER=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var line [64]byte
	n, err := out.Read(line[:])
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(strings.TrimPrefix(string(line[:n]), "pid ")))
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	// The orphan is reaped by somebody else: all that shows is that it is gone
	// or a zombie.
	ctx, stop := context.WithTimeout(context.Background(), 10*time.Second)
	defer stop()
	for {
		state, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
		if errors.Is(err, os.ErrNotExist) || strings.Contains(string(state), ") Z ") {
			return
		}
		select {
		case <-ctx.Done():
			syscall.Kill(pid, syscall.SIGKILL)
			t.Fatalf("process %d lives on: %s", pid, state)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func TestConsole(t *testing.T) {
	var c console
	if got := c.summary(); got != "" {
		t.Errorf("empty console: %q", got)
	}
	c.Write([]byte("first\n\x1b[31mred\x1b[0m\r\n\n\xff\xfelast"))
	if got, want := c.summary(), "; console: first | red | last"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	c.Write(make([]byte, 10*consoleTail))
	c.Write([]byte("\nend"))
	if len(c.tail) > consoleTail || c.lines(1)[0] != "end" {
		t.Errorf("%d bytes, ends in %q", len(c.tail), c.lines(1))
	}
}

// The user id of a process that does not end is not given to another.
func TestUndeadKeepsItsID(t *testing.T) {
	all := &ids{first: 64000, used: make([]bool, 1)}
	g := new(guestVM)
	g.ctx, g.cancel = context.WithCancelCause(t.Context())
	if _, _, err := g.takeIDs(all); err != nil {
		t.Fatal(err)
	}
	g.undead = true // it was started, and could neither be confined nor killed
	if err := g.close(); err != nil {
		t.Error(err)
	}
	if id, _, err := all.take(); err == nil {
		t.Errorf("%d is given away", id)
	}
}

// Who waits for a process that the kernel does not let go gets an answer.
func TestProcessThatDoesNotEnd(t *testing.T) {
	cmd := exec.Command(inPath(t, "sleep"), "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	p := &process{cmd: cmd, done: newDone()} // nobody reaps it
	if err := p.stopWithin(time.Millisecond); !errors.Is(err, errUndead) {
		t.Errorf("got %v", err)
	}
}
