package guest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"nbd/vm/link"
)

// These tests run builders in the real sandbox, in namespaces of this machine.
// They need root and a static busybox, which the other tests of guests need
// too; without them they fail.

const testOut = "/nix/store/8b5pmbnyr2pqd7whh57s7pk4yj4g0m4c-test"

// A lab is a place to run builders.
type lab struct {
	t       *testing.T
	busybox string
	inputs  string // directory of store objects
	order   *link.BuildOrder
	st      *stage
	started func() // called when the builder runs; may be nil
}

// newLab returns a lab whose only input is busybox, with its programs' links.
func newLab(t *testing.T) *lab {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("the sandbox can be made by root only: run the tests of this package as root")
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatalf("%v (install busybox-static)", err)
	}
	l := &lab{t: t, busybox: busybox, inputs: t.TempDir()}
	const name = "26xbg1ndr7hbcncrlf9nhx5is2b25d13-busybox"
	bin := filepath.Join(l.inputs, name, "bin")
	if err := os.MkdirAll(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bin, "busybox"), program, 0o555); err != nil {
		t.Fatal(err)
	}
	list, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, applet := range strings.Fields(string(list)) {
		if applet != "busybox" {
			if err := os.Symlink("busybox", filepath.Join(bin, applet)); err != nil {
				t.Fatal(err)
			}
		}
	}
	path := storeDir + "/" + name + "/bin"
	l.order = &link.BuildOrder{
		DrvPath: "/nix/store/s66mzxpvicwk07gjbjfw9izjfa797vsw-test.drv",
		System:  "x86_64-linux",
		Builder: path + "/busybox",
		Env: [][]byte{
			[]byte("PATH=" + path), []byte("out=" + testOut), []byte("busybox=" + storeDir + "/" + name),
			[]byte("HOME=/homeless-shelter"), []byte("PWD=/build"),
		},
		Inputs:  []string{name},
		Outputs: []link.Output{{Name: "out", Path: testOut}},
	}
	return l
}

// run runs a script and returns its result and log.
func (l *lab) run(script string) (*link.Result, string) {
	l.t.Helper()
	l.order.Args = [][]byte{[]byte("busybox"), []byte("sh"), []byte("-e"), []byte("-c"), []byte(script)}
	return l.runOrder(context.Background())
}

func (l *lab) runOrder(ctx context.Context) (*link.Result, string) {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	dir := l.t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "top"), 0o755); err != nil {
		l.t.Fatal(err)
	}
	st, s := l.stage(filepath.Join(dir, "top"))
	l.st = st
	var log bytes.Buffer
	started := 0
	r := &link.Result{}
	err := s.run(ctx, st, l.order, &log, func() error {
		started++
		if l.started != nil {
			l.started()
		}
		return nil
	}, r)
	if err != nil {
		l.t.Fatalf("%v\nlog: %s", err, log.String())
	}
	if started != 1 {
		l.t.Errorf("started was called %d times", started)
	}
	if r.LogBytes != int64(log.Len()) {
		l.t.Errorf("LogBytes is %d, not %d", r.LogBytes, log.Len())
	}
	return r, log.String()
}

// newTestStage returns a stage without a shell.
func newTestStage(t *testing.T) *stage {
	t.Helper()
	st, err := newStage(t.TempDir(), "")
	must(t, err)
	return st
}

// stage returns a stage in dir and a sandbox on it, without a cgroup.
func (l *lab) stage(dir string) (*stage, *sandbox) {
	l.t.Helper()
	st, err := newStage(dir, l.busybox)
	if err != nil {
		l.t.Fatal(err)
	}
	s, err := newSandbox(nil, st)
	if err != nil {
		l.t.Fatal(err)
	}
	if err := st.furnish(l.inputs, l.order); err != nil {
		l.t.Fatal(errors.Join(err, s.end()))
	}
	return st, s
}

// out returns a file of the output.
func (l *lab) out(name string) string {
	l.t.Helper()
	b, err := os.ReadFile(filepath.Join(l.st.root(), testOut, name))
	if err != nil {
		l.t.Fatal(err)
	}
	return string(b)
}

func wantExit(t *testing.T, r *link.Result, status int, log string) {
	t.Helper()
	if r.Kind != link.Exited || r.ExitStatus != status {
		t.Fatalf("result is %+v, want exit status %d\nlog: %s", r, status, log)
	}
}

// TestSandboxLooksLikeNix compares what a builder sees with what it saw in a
// sandbox of Nix; testdata/README.md tells how that was recorded.
func TestSandboxLooksLikeNix(t *testing.T) {
	script, err := os.ReadFile("testdata/sandbox.sh")
	if err != nil {
		t.Fatal(err)
	}
	l := newLab(t)
	r, log := l.run(string(script))
	wantExit(t, r, 0, log)
	golden, err := filepath.Glob("testdata/sandbox/*")
	if err != nil || len(golden) == 0 {
		t.Fatal("no golden files", err)
	}
	for _, name := range golden {
		want, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(l.out(filepath.Base(name)), "\n")); diff != "" {
			t.Errorf("%s (- Nix, + here):\n%s", filepath.Base(name), diff)
		}
	}
}

func TestSandboxEnds(t *testing.T) {
	for _, tt := range []struct {
		name, script string
		want         link.Result
		log          string
	}{
		{name: "success", script: "echo hello", want: link.Result{Kind: link.Exited}, log: "hello\n"},
		{name: "failure", script: "echo bye >&2; exit 3", want: link.Result{Kind: link.Exited, ExitStatus: 3}, log: "bye\n"},
		{name: "child killed", script: "sh -c 'kill -9 $$' || exit $?", want: link.Result{Kind: link.Exited, ExitStatus: 137}, log: "Killed\n"},
		{name: "log closed", script: "exec >&- 2>&-; sleep 50", want: link.Result{Kind: link.Signaled, Signal: 9}},
		{name: "leftovers", script: "sleep 50 & setsid sleep 50 & echo x", want: link.Result{Kind: link.Exited}, log: "x\n"},
		{name: "no newline", script: "printf 'a\\r\\nb\\000\\377c'", want: link.Result{Kind: link.Exited}, log: "a\r\nb\x00\xffc"},
		{name: "no terminal", script: "cat /dev/tty", want: link.Result{Kind: link.Exited, ExitStatus: 1},
			log: "cat: can't open '/dev/tty': No such device or address\n"},
		{name: "input", script: "grep flags /proc/self/fdinfo/0", want: link.Result{Kind: link.Exited}, log: "flags:\t0100002\n"},
		{name: "score", script: "cd /proc/self; echo 500 > oom_score_adj; echo -1 > oom_score_adj",
			want: link.Result{Kind: link.Exited, ExitStatus: 1}, log: "sh: write error: Permission denied\n"},
		{name: "process ids", script: "echo $$; sh -c 'echo $$'; true", want: link.Result{Kind: link.Exited}, log: "1\n2\n"},
		{name: "group", script: "cat /proc/self/cpuset; tail -1 /proc/self/cgroup", want: link.Result{Kind: link.Exited}, log: "/\n0::/\n"},
		{name: "no input", script: "readlink /proc/self/fd/0; wc -c", want: link.Result{Kind: link.Exited}, log: "/dev/null\n0\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, log := newLab(t).run(tt.script)
			r.LogBytes = 0
			if diff := cmp.Diff(&tt.want, r); diff != "" {
				t.Error(diff)
			}
			if log != tt.log {
				t.Errorf("log is %q, want %q", log, tt.log)
			}
		})
	}
}

func TestBuilderThatCannotBeExecuted(t *testing.T) {
	l := newLab(t)
	l.order.Builder = "/no/such/program"
	l.order.Args = [][]byte{[]byte("program")}
	r, log := l.runOrder(context.Background())
	wantExit(t, r, 1, log)
	if want := "error: executing '/no/such/program': No such file or directory\n"; log != want {
		t.Errorf("log is %q, want %q", log, want)
	}
}

func TestFilesOfTheBuildDirectory(t *testing.T) {
	l := newLab(t)
	l.order.Files = []link.File{{Name: ".attr-x", Data: []byte("a\x00b")}, {Name: "big", Data: make([]byte, 1<<20)}}
	r, log := l.run("stat -c '%a %u %g %s %n' .attr-x big; od -An -tx1 .attr-x; echo more >> big")
	wantExit(t, r, 0, log)
	if want := "644 1000 100 3 .attr-x\n644 1000 100 1048576 big\n 61 00 62\n"; log != want {
		t.Errorf("log is %q, want %q", log, want)
	}
}

// TestInputsAreNotOurs tries what a builder could do to its inputs.
func TestInputsAreNotOurs(t *testing.T) {
	l := newLab(t)
	for name, content := range map[string]string{"3n7vmfz4nfxmv8gzckwb2yv0hvrfsmgw-file": "f", "5wvwgl8x1kz0kmqyn0l5rcrjl3b2hm2j-link": ""} {
		path := filepath.Join(l.inputs, name)
		var err error
		if content == "" {
			err = os.Symlink("/nix/store/3n7vmfz4nfxmv8gzckwb2yv0hvrfsmgw-file", path)
		} else {
			err = os.WriteFile(path, []byte(content), 0o444)
		}
		if err != nil {
			t.Fatal(err)
		}
		l.order.Inputs = append(l.order.Inputs, name)
	}
	r, log := l.run(`
try() { if "$@" 2>/dev/null; then echo "possible: $*"; fi; }
cd /nix/store
try touch $busybox/new
try chmod u+w $busybox/bin/busybox
try mv $busybox elsewhere
try rm 5wvwgl8x1kz0kmqyn0l5rcrjl3b2hm2j-link
try ln $busybox/bin/busybox hard
try ln 3n7vmfz4nfxmv8gzckwb2yv0hvrfsmgw-file hard
try ln /build/.x hard
try mount -t tmpfs none /tmp
try umount $busybox
try hostname other
try mknod c c 1 3
try mkdir /nix/new
cat 5wvwgl8x1kz0kmqyn0l5rcrjl3b2hm2j-link; echo
ls | sort
`)
	wantExit(t, r, 0, log)
	want := "f\n26xbg1ndr7hbcncrlf9nhx5is2b25d13-busybox\n3n7vmfz4nfxmv8gzckwb2yv0hvrfsmgw-file\n5wvwgl8x1kz0kmqyn0l5rcrjl3b2hm2j-link\n"
	if log != want {
		t.Errorf("log is\n%s, want\n%s", log, want)
	}
}

func TestSeccompInTheSandbox(t *testing.T) {
	l := newLab(t)
	r, log := l.run(`
touch f
for m in 4755 2755 6755 755 1777 644; do chmod $m f 2>/dev/null && echo $m; done
mkdir d; chmod g+s d 2>/dev/null || echo no sgid directory
`)
	wantExit(t, r, 0, log)
	if want := "755\n1777\n644\nno sgid directory\n"; log != want {
		t.Errorf("log is %q, want %q", log, want)
	}
}

func TestPersonality(t *testing.T) {
	l := newLab(t)
	for system, want := range map[string]string{"x86_64-linux": "x86_64 00040000\n", "i686-linux": "i686 00040008\n"} {
		l.order.System = system
		r, log := l.run("echo $(uname -m) $(cat /proc/self/personality)")
		wantExit(t, r, 0, log)
		if log != want {
			t.Errorf("%s: %q, want %q", system, log, want)
		}
	}
}

func TestCancel(t *testing.T) {
	l := newLab(t)
	ctx, cancel := context.WithCancel(context.Background())
	l.started = cancel
	l.order.Args = [][]byte{[]byte("busybox"), []byte("sleep"), []byte("50")}
	r, _ := l.runOrder(ctx)
	if r.Kind != link.Signaled || r.Signal != 9 {
		t.Errorf("result is %+v, want signal 9", r)
	}
}

// TestSandboxThatCannotBeMade wants an error, not a build that failed.
func TestSandboxThatCannotBeMade(t *testing.T) {
	l := newLab(t)
	dir := t.TempDir()
	st, s := l.stage(dir)
	st.binds = append(st.binds, bind{"/nonexistent", "/tmp"})
	r := &link.Result{}
	err := s.run(context.Background(), st, l.order, io.Discard, func() error { return nil }, r)
	if err == nil || !strings.Contains(err.Error(), "bind /tmp: no such file or directory") {
		t.Errorf("got %v", err)
	}
	if r.Kind != "" {
		t.Errorf("result is %+v", r)
	}
	l.order.Inputs = append(l.order.Inputs, "missing")
	if err := newTestStage(t).furnish(l.inputs, l.order); err == nil {
		t.Error("no error for an input that is not there")
	}
	l.order.Inputs = []string{"../x"}
	if err := newTestStage(t).furnish(l.inputs, l.order); err == nil {
		t.Error("no error for a bad name of an input")
	}
}

// TestLongLog sees that no byte is lost or changed between builder and host.
func TestLongLog(t *testing.T) {
	r, log := newLab(t).run(`i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done; head -c 2097152 /dev/zero`)
	wantExit(t, r, 0, log[:min(len(log), 1000)])
	want := sha256.New()
	for i := range 20000 {
		fmt.Fprintln(want, "line", i)
	}
	want.Write(make([]byte, 2<<20))
	got := sha256.Sum256([]byte(log))
	if !bytes.Equal(got[:], want.Sum(nil)) {
		t.Errorf("the log's %d bytes are not what was written", len(log))
	}
}

// TestLogWithoutListener sees that a builder ends when its log cannot be sent.
func TestLogWithoutListener(t *testing.T) {
	l := newLab(t)
	l.order.Args = [][]byte{[]byte("busybox"), []byte("seq"), []byte("200000")}
	st, s := l.stage(t.TempDir())
	gone := errors.New("gone")
	err := s.run(context.Background(), st, l.order, failingWriter{gone}, func() error { return nil }, &link.Result{})
	if !errors.Is(err, gone) {
		t.Errorf("got %v, want %v", err, gone)
	}
}

type failingWriter struct{ err error }

func (w failingWriter) Write([]byte) (int, error) { return 0, w.err }

// What was made before a template was saved is no older than what a build adds.
func TestStageIsAsYoungAsItsBuild(t *testing.T) {
	l := newLab(t)
	st := newTestStage(t)
	old := time.Unix(1_000_000_000, 0)
	for _, path := range st.made {
		must(t, unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{{Sec: old.Unix()}, {Sec: old.Unix()}}, unix.AT_SYMLINK_NOFOLLOW))
	}
	must(t, st.furnish(l.inputs, l.order))
	must(t, filepath.WalkDir(st.dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || path == st.dir {
			return err
		}
		info, err := e.Info()
		if err == nil && info.ModTime().Before(old.Add(time.Hour)) {
			t.Errorf("%s is of %v", path, info.ModTime())
		}
		return err
	}))
}
