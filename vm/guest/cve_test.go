package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"nbd/nixproto/nar"
	"nbd/vm/link"
)

// One test for each advisory about Nix's sandbox, of 2024 and later, that a
// guest could be open to; the list, with those that do not apply, is in
// vm/THREATS.md. A guest runs one build and is thrown away, so that most of these
// would gain nothing; the sandbox in it must stop them all the same.

// attacks are what this program does instead of testing when it is a builder
// with such a name.
var attacks = map[string]func() error{
	"attack-abstract-socket": connectAbstract,
	"attack-setuid":          makeSetUID,
}

// attack runs one of attacks as the builder.
func (l *lab) attack(name string, env ...string) (*link.Result, string) {
	l.t.Helper()
	wantStatic(l.t)
	program, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		l.t.Fatal(err)
	}
	const object = "6b5pmbnyr2pqd7whh57s7pk4yj4g0m4c-attack"
	if err := os.WriteFile(filepath.Join(l.inputs, object), program, 0o555); err != nil {
		l.t.Fatal(err)
	}
	l.order.Inputs = append(l.order.Inputs, object)
	l.order.Builder, l.order.Args = storeDir+"/"+object, [][]byte{[]byte(name)}
	for _, e := range env {
		l.order.Env = append(l.order.Env, []byte(e))
	}
	return l.runOrder(context.Background())
}

// victim is a file of the machine that belongs to root; unharmed fails the test
// if it is not as it was.
func victim(t *testing.T) (path string, unharmed func()) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "victim")
	must(t, os.WriteFile(path, []byte("unharmed"), 0o640))
	look := func() string {
		var st unix.Stat_t
		must(t, unix.Lstat(path, &st))
		text, err := os.ReadFile(path)
		must(t, err)
		return fmt.Sprintf("%s %o %d:%d %d links", text, st.Mode, st.Uid, st.Gid, st.Nlink)
	}
	before := look()
	return path, func() {
		t.Helper()
		if diff := cmp.Diff(before, look()); diff != "" {
			t.Error(diff)
		}
	}
}

// connectAbstract tries to reach a socket outside.
func connectAbstract() error {
	c, err := net.Dial("unix", os.Getenv("SOCKET"))
	if err == nil {
		err = errors.Join(errors.New("connected"), c.Close())
	}
	return err
}

// CVE-2024-27297: the builder of a fixed output, in the network of its host, sent
// an open file of its output to somebody else through a socket in the abstract
// namespace, who changed it after it had been checked. CVE-2025-46416 went the
// same way to become the build user.
func TestCVE202427297(t *testing.T) {
	l := newLab(t)
	l.order.FixedOutput = true
	l.order.Network = &link.Network{Nameserver: "192.0.2.1"}
	name := "@" + t.TempDir()
	socket, err := net.Listen("unix", name)
	must(t, err)
	defer socket.Close()
	r, log := l.attack("attack-abstract-socket", "SOCKET="+name)
	wantExit(t, r, 1, log)
	if !strings.Contains(log, "connection refused") {
		t.Errorf("log: %s", log)
	}
}

// CVE-2025-46416, the other half: nobody is left who could hold on to anything
// when the outputs are read.
func TestCVE202546416(t *testing.T) {
	l := newLab(t)
	r, log := l.run(`
		mkfifo fifo
		setsid sh -c 'exec 3<>fifo 4>$out; touch ready; exec sleep 1000' >/dev/null 2>&1 &
		until [ -e ready ]; do :; done
	`)
	wantExit(t, r, 0, log)
	fd, err := unix.Open(filepath.Join(l.st.build(), "fifo"), unix.O_WRONLY|unix.O_NONBLOCK, 0)
	if !errors.Is(err, unix.ENXIO) { // nobody reads
		t.Errorf("the pipe opens: %d, %v", fd, err)
	}
}

// makeSetUID tries each way to make a program of another user's.
func makeSetUID() error {
	const file = "/build/file"
	bits := uint32(unix.S_ISUID | unix.S_ISGID)
	err := os.WriteFile(file, []byte("#!/bin/sh\n"), 0o755)
	for name, try := range map[string]func() error{
		"chmod":    func() error { return unix.Chmod(file, bits|0o755) },
		"fchmodat": func() error { return unix.Fchmodat(unix.AT_FDCWD, file, bits|0o755, 0) },
		"directory": func() error {
			return errors.Join(os.Mkdir("/build/dir", 0o755), unix.Chmod("/build/dir", unix.S_ISGID|0o755))
		},
		"output": func() error {
			return errors.Join(os.WriteFile(os.Getenv("out"), []byte("#!/bin/sh\n"), 0o755), unix.Chmod(os.Getenv("out"), bits|0o755))
		},
	} {
		if tried := try(); !errors.Is(tried, unix.EPERM) {
			err = errors.Join(err, fmt.Errorf("%s: %v", name, tried))
		}
	}
	return err
}

// CVE-2024-38531: the directory of a build could be entered by all users, who met
// set-user-id programs there.
func TestCVE202438531(t *testing.T) {
	l := newLab(t)
	r, log := l.attack("attack-setuid")
	wantExit(t, r, 0, log)
	info, err := os.Stat(l.st.build())
	must(t, err)
	if info.Mode() != os.ModeDir|0o700 {
		t.Errorf("the build directory has mode %v", info.Mode())
	}
	info, err = os.Stat(l.st.root())
	must(t, err)
	if info.Mode()&0o007 != 0 {
		t.Errorf("the root directory has mode %v", info.Mode())
	}
}

// CVE-2025-52991: a build's directory was made where somebody else could have put
// something before.
func TestCVE202552991(t *testing.T) {
	l := newLab(t)
	for _, name := range []string{"build", "root"} {
		elsewhere := t.TempDir()
		top := t.TempDir()
		must(t, os.Symlink(elsewhere, filepath.Join(top, name)))
		if _, err := newStage(top, l.busybox); !errors.Is(err, os.ErrExist) {
			t.Errorf("%s: %v", name, err)
		}
		entries, err := os.ReadDir(elsewhere)
		must(t, err)
		if len(entries) > 0 {
			t.Errorf("%s: made elsewhere: %v", name, entries)
		}
	}
}

// CVE-2025-52993: between making a file in a build's directory and giving it to
// the build user, something else took its place. CVE-2025-46415: the same while
// a directory was deleted. Here files are made and given away before there is a
// builder, and none of their names leads elsewhere; nothing is deleted.
func TestCVE202552993(t *testing.T) {
	path, unharmed := victim(t)
	l := newLab(t)
	l.order.Files = []link.File{{Name: ".attr-x", Data: []byte("a")}}
	l.order.Env = append(l.order.Env, []byte("VICTIM="+path))
	r, log := l.run(`rm .attr-x; ln -s "$VICTIM" .attr-x; mkdir d; ln -s "$(dirname "$VICTIM")" d/l; mv d .attr-y; echo x > $out`)
	wantExit(t, r, 0, log)
	must(t, checkOutputs(l.st.root(), l.order, builderUID))
	unharmed()
	for _, name := range []string{"../victim", "a/b", "..", ".", "", "a\x00b", path} {
		l.order.Files = []link.File{{Name: name, Data: []byte("a")}}
		if err := newTestStage(t).furnish(l.inputs, l.order); err == nil {
			t.Errorf("a file %q was made", name)
		}
	}
	unharmed()
}

// CVE-2025-53819: builders ran as root. (On macOS, by a mistake.)
func TestCVE202553819(t *testing.T) {
	r, log := newLab(t).run("grep -E '^(Uid|Gid|Cap(Inh|Prm|Eff|Amb)|NoNewPrivs|Seccomp):' /proc/self/status")
	wantExit(t, r, 0, log)
	const none = "\t0000000000000000\n"
	want := "Uid:\t1000\t1000\t1000\t1000\nGid:\t100\t100\t100\t100\nCapInh:" + none + "CapPrm:" + none + "CapEff:" + none + "CapAmb:" + none + "NoNewPrivs:\t1\nSeccomp:\t2\n"
	if diff := cmp.Diff(want, log); diff != "" {
		t.Error(diff)
	}
}

// CVE-2024-51481: builtin builders ran outside the sandbox, where they could read
// and write what everybody may. (On macOS.)
func TestCVE202451481(t *testing.T) {
	l := newLab(t)
	l.order.FixedOutput = true
	open := filepath.Join(t.TempDir(), "open")
	must(t, os.WriteFile(open, []byte("x"), 0o666), os.Chmod(open, 0o666))
	for _, file := range []string{open, "/proc/1/root" + open, "/etc/shadow", "/proc/self/environ"} {
		r, log := l.builtin("fetchurl", "url=file://"+file)
		if file == "/proc/self/environ" { // its own, and empty
			wantExit(t, r, 0, log)
			if got := l.out(""); got != "" {
				t.Errorf("its environment is %q", got)
			}
			continue
		}
		wantExit(t, r, 1, log)
		if !strings.Contains(log, "Could not open file "+file) {
			t.Errorf("%s: %s", file, log)
		}
	}
	r, log := l.builtin("buildenv", "derivations=true 5 1 "+filepath.Dir(open), "manifest=/m")
	wantExit(t, r, 1, log)
}

// CVE-2026-39860: the output of a fixed-output derivation was copied to a place
// within the sandbox, where a symlink that the builder had made was followed.
// Here nothing is written where a builder could write, and what it made is read
// without following anything.
func TestCVE202639860(t *testing.T) {
	path, unharmed := victim(t)
	l := newLab(t)
	l.order.FixedOutput = true
	l.order.Env = append(l.order.Env, []byte("VICTIM="+path))
	r, log := l.run(`for l in $out $out.tmp $out-tmp .tmp; do ln -s "$VICTIM" "$l"; done`)
	wantExit(t, r, 0, log)
	must(t, checkOutputs(l.st.root(), l.order, builderUID))
	archive := dumpOutput(t, l)
	want := nar.Index{{Kind: nar.Symlink, Target: path}}
	if diff := cmp.Diff(want, archive); diff != "" {
		t.Error(diff)
	}
	unharmed()
	// Neither is the store itself one, when it is opened.
	l = newLab(t)
	l.order.Env = append(l.order.Env, []byte("VICTIM="+filepath.Dir(path)))
	r, log = l.run(`mkdir $out; ln -s "$VICTIM" $out/d; mv /nix/store /nix/gone && ln -s "$VICTIM" /nix/store || true`)
	wantExit(t, r, 0, log)
	if archive := dumpOutput(t, l); len(archive) != 2 || archive[1].Kind != nar.Symlink {
		t.Errorf("%v", archive)
	}
}

// dumpOutput returns what is sent of the output.
func dumpOutput(t *testing.T, l *lab) nar.Index {
	t.Helper()
	parent, err := os.Open(filepath.Join(l.st.root(), storeDir))
	must(t, err)
	defer parent.Close()
	var b bytes.Buffer
	must(t, dumpTree(&b, parent, filepath.Base(testOut), testOut, builderUID))
	index, _, err := nar.ReadIndex(&b)
	must(t, err)
	return index
}
