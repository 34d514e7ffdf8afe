package guest

import (
	"archive/tar"
	"context"
	"debug/elf"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"nbd/vm/link"
)

// wantStatic fails a test that is about to run this program in the sandbox, if
// that cannot be.
func wantStatic(t *testing.T) {
	t.Helper()
	program, err := elf.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer program.Close()
	if libraries, err := program.ImportedLibraries(); err != nil || len(libraries) > 0 {
		t.Fatalf("this program cannot start in the sandbox: it needs %q, %v (run the tests with CGO_ENABLED=0)", libraries, err)
	}
}

// builtin runs a builtin builder in the sandbox; attributes are "NAME=value".
func (l *lab) builtin(name string, attrs ...string) (*link.Result, string) {
	l.t.Helper()
	wantStatic(l.t)
	l.order.Builder, l.order.Args, l.order.Env = link.BuiltinPrefix+name, nil, nil
	for _, a := range attrs {
		l.order.Env = append(l.order.Env, []byte(a))
	}
	return l.runOrder(context.Background())
}

// input makes a store object of one file and returns its path.
func (l *lab) input(name string, text []byte) string {
	l.t.Helper()
	if err := os.WriteFile(filepath.Join(l.inputs, name), text, 0o444); err != nil {
		l.t.Fatal(err)
	}
	l.order.Inputs = append(l.order.Inputs, name)
	return storeDir + "/" + name
}

func TestBuiltinBuildEnvironment(t *testing.T) {
	l := newLab(t)
	busybox := storeDir + "/" + l.order.Inputs[0]
	r, log := l.builtin("buildenv", "derivations=true 5 1 "+busybox, "manifest=/m")
	wantExit(t, r, 0, log)
	out := filepath.Join(l.st.root(), testOut)
	for name, want := range map[string]string{"bin": busybox + "/bin", "manifest.nix": "/m"} {
		if to, err := os.Readlink(filepath.Join(out, name)); err != nil || to != want {
			t.Errorf("%s: %q, %v", name, to, err)
		}
	}
	info, err := os.Stat(out)
	if err != nil {
		t.Fatal(err)
	}
	// By the build user, with its umask: an output like others.
	if st := info.Sys().(*syscall.Stat_t); st.Uid != builderUID || st.Gid != builderGID || info.Mode().Perm() != 0o755 {
		t.Errorf("the output belongs to %d:%d and has mode %v", st.Uid, st.Gid, info.Mode())
	}
	if err := checkOutputs(l.st.root(), l.order, builderUID); err != nil {
		t.Error(err)
	}
	r, log = l.builtin("nonsense")
	wantExit(t, r, 1, log)
	if !strings.Contains(log, "unsupported builtin builder") {
		t.Error(log)
	}
}

func TestBuiltinUnpackChannel(t *testing.T) {
	l := newLab(t)
	var b strings.Builder
	w := tar.NewWriter(&b)
	for _, h := range []*tar.Header{
		{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o111},
		{Name: "d/f", Typeflag: tar.TypeReg, Mode: 0o6777, Size: 1}, // which the filter of system calls would refuse
	} {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	src := l.input("3b5pmbnyr2pqd7whh57s7pk4yj4g0m4c-channel.tar", []byte(b.String()))
	r, log := l.builtin("unpack-channel", "src="+src, "channelName=chan")
	wantExit(t, r, 0, log)
	if got := l.out("chan/f"); got != "x" {
		t.Errorf("%q", got)
	}
	info, err := os.Stat(filepath.Join(l.st.root(), testOut, "chan/f"))
	if err != nil || info.Mode() != 0o755 {
		t.Errorf("%v, %v", info, err)
	}
}

func TestBuiltinFetchURL(t *testing.T) {
	l := newLab(t)
	src := l.input("4b5pmbnyr2pqd7whh57s7pk4yj4g0m4c-file", []byte("text"))
	r, log := l.builtin("fetchurl", "url=file://"+src, "executable=1")
	wantExit(t, r, 1, log)
	if !strings.Contains(log, "must be a fixed-output") {
		t.Error(log)
	}
	l.order.FixedOutput = true
	r, log = l.builtin("fetchurl", "url=file://"+src, "executable=1")
	wantExit(t, r, 0, log)
	if got := l.out(""); got != "text" {
		t.Errorf("%q", got)
	}
	// Nothing but the sandbox is seen: no file of the machine, no certificates
	// but those of a build with a network.
	r, log = l.builtin("fetchurl", "url=file:///etc/hostname")
	wantExit(t, r, 1, log)
	r, log = l.builtin("fetchurl", "url=https://127.0.0.1:1/")
	wantExit(t, r, 1, log)
	if !strings.Contains(log, "no certificates of authorities") {
		t.Error(log)
	}
}

func TestCertificatesInSandbox(t *testing.T) {
	l := newLab(t)
	l.order.Network = &link.Network{Nameserver: "192.0.2.1", Certificates: []byte("some")}
	r, log := l.run("cat /etc/ssl/certs/ca-certificates.crt; ls -ld /etc/ssl /etc/ssl/certs/ca-certificates.crt | cut -c 1-10")
	wantExit(t, r, 0, log)
	if want := "somedrwxr-xr-x\n-rw-r--r--\n"; log != want {
		t.Errorf("%q, not %q", log, want)
	}
	l.order.Network.Certificates = nil
	r, log = l.run("ls /etc")
	wantExit(t, r, 0, log)
	if strings.Contains(log, "ssl") {
		t.Error(log)
	}
}
