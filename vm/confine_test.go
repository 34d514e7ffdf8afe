package vm

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// What a confined process can do, tried by one whose program is a shell. On a
// kernel without Landlock, or without root, there is less, and it is said.
func TestConfinement(t *testing.T) {
	before := statusOf(t, os.Getpid())["NoNewPrivs"]
	c, weak := newConfinement(inPath(t, "true"), -1)
	t.Logf("Landlock %d, a network of its own: %v; weaknesses: %q", c.landlock, c.network, weak)
	if (c.landlock == 0) != strings.Contains(strings.Join(weak, "; "), "Landlock") {
		t.Errorf("Landlock %d, and weaknesses %q", c.landlock, weak)
	}
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	secret := filepath.Join(dir, "secret")
	if err := os.WriteFile(secret, []byte("secret"), 0o666); err != nil {
		t.Fatal(err)
	}
	// As scratch disks are: without a name.
	f, err := os.Create(filepath.Join(dir, "scratch"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := os.Remove(f.Name()); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("scratch\n"); err != nil {
		t.Fatal(err)
	}
	ram, err := memfd("test", 4096)
	if err != nil {
		t.Fatal(err)
	}
	defer ram.Close()
	// As kernels are: shared with others.
	shared, _, err := namelessFile(dir, func(w io.Writer) error { _, err := io.WriteString(w, "kernel"); return err })
	if err != nil {
		t.Fatal(err)
	}
	defer shared.Close()
	script := `
try() { if (eval "$2") >/dev/null 2>&1; then echo "$1"; else echo "no $1"; fi; }
try scratch 'cat /proc/self/fd/3 && echo more >> /proc/self/fd/3'
try ram 'echo more > /proc/self/fd/4'
try kernel 'cat /proc/self/fd/5'
try rewrite 'echo > /proc/self/fd/5'
try overwrite 'echo >&5'
try library 'cat /usr/bin/cat'
try read 'cat ` + secret + `'
try write 'echo > ` + secret + `'
try create 'echo > ` + dir + `/new'
try list 'ls ` + dir + `'
try environment 'cat /proc/$PPID/environ'
try kill 'kill -0 ` + "$PPID" + `'
ulimit -c
ulimit -n
echo ready
sleep 1000
`
	out, in := io.Pipe()
	defer out.Close()
	p, err := startProcess(command{path: inPath(t, "bash"), args: []string{"-c", script}, uid: -1,
		files: []*os.File{f, ram, shared}, confine: c, output: in})
	if err != nil {
		t.Fatal(err)
	}
	defer p.stop()
	var said []string
	for lines := bufio.NewScanner(out); lines.Scan() && lines.Text() != "ready"; {
		said = append(said, lines.Text())
	}
	want := []string{"scratch", "ram", "library", "kernel", "no overwrite", "0", "4096"}
	if c.landlock > 0 {
		want = append(want, "no read", "no write", "no create", "no list", "no environment", "no rewrite")
	}
	if c.landlock >= 6 {
		want = append(want, "no kill")
	}
	for _, w := range want {
		if !slices.Contains(said, w) {
			t.Errorf("%q is missing in %q", w, said)
		}
	}
	checkConfined(t, p.pid(), c)
	// Nothing of this is left on us, least of all on the main thread.
	if got := statusOf(t, os.Getpid())["NoNewPrivs"]; got != before {
		t.Errorf("our main thread has NoNewPrivs %s, it was %s", got, before)
	}
	if _, err := os.ReadFile(secret); err != nil {
		t.Error(err)
	}
}

// Wherever QEMU is installed, what it may read is not the whole folder above, which
// may be somebody's home.
func TestProgramFiles(t *testing.T) {
	usual := len(programFiles("/usr/bin/qemu"))
	for program, want := range map[string][]string{
		"/nix/store/x/bin/qemu": {},
		"/home/alice/bin/qemu":  {"/home/alice/bin", "/home/alice/lib", "/home/alice/lib64", "/home/alice/share/qemu"},
	} {
		if got := programFiles(program)[usual:]; !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", program, got, want)
		}
	}
}

// A QEMU that does not answer delays the start of a server, and no more.
func TestConfinementOfAProgramThatHangs(t *testing.T) {
	hasten(t, 100)
	program := filepath.Join(t.TempDir(), "qemu")
	if err := os.WriteFile(program, []byte("#!/bin/sh\nexec sleep 1000\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	c, weak := newConfinement(program, -1)
	if c.network || c.landlock != 0 {
		t.Errorf("%+v, weaknesses: %q", c, weak)
	}
}

// checkConfined checks what the kernel tells of a confined process.
func checkConfined(t *testing.T, pid int, c *confinement) {
	t.Helper()
	if got := statusOf(t, pid)["NoNewPrivs"]; got != "1" {
		t.Errorf("NoNewPrivs is %s", got)
	}
	proc := fmt.Sprintf("/proc/%d/", pid)
	if got, err := os.ReadFile(proc + "oom_score_adj"); err != nil || string(got) != "800\n" {
		t.Errorf("oom_score_adj is %q, %v", got, err)
	}
	if got, err := os.ReadFile(proc + "limits"); c.limits && (err != nil || !regexp.MustCompile(`Max core file size +0 +0 `).Match(got) ||
		!regexp.MustCompile(`Max open files +4096 +4096 `).Match(got) || regexp.MustCompile(`Max file size +unlimited`).Match(got)) {
		t.Errorf("limits: %s, %v", got, err)
	}
	if !c.network {
		return
	}
	for _, ns := range []string{"net", "ipc", "uts"} {
		ours, err1 := os.Readlink("/proc/self/ns/" + ns)
		its, err2 := os.Readlink(proc + "ns/" + ns)
		if err1 != nil || err2 != nil || ours == its {
			t.Errorf("namespace %s: %s and %s (%v, %v)", ns, ours, its, err1, err2)
		}
	}
	if got, err := os.ReadFile(proc + "net/dev"); err != nil || strings.Count(string(got), ":") > 1 {
		t.Errorf("network devices: %s, %v", got, err)
	}
}

// statusOf returns /proc/PID/status.
func statusOf(t *testing.T, pid int) map[string]string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, ":")
		all[name] = strings.Join(strings.Fields(value), " ")
	}
	return all
}
