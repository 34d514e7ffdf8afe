package vm

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"nbd/vm/guest"
)

// The tests of this file boot guests, whose init is this test program itself.
// They run under emulation, which works everywhere; the detection of KVM is
// tested with what the machine has.

func TestMain(m *testing.M) {
	if name := filepath.Base(os.Args[0]); strings.HasPrefix(name, fakeQEMUPrefix) || name == archAArch64.qemu {
		fakeQEMUMain()
	}
	guest.Enter()
	status := m.Run()
	if testStateDir != "" {
		if err := os.RemoveAll(testStateDir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			status = 1
		}
	}
	os.Exit(status)
}

// testStateDir is what testState made.
var testStateDir string

// testState returns a state directory with a kernel for guests, which all tests
// share: what NBD_TEST_KERNEL names (a package, or a folder), or one that is
// installed.
var testState = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "nbd-vm-test-")
	if err != nil {
		return "", err
	}
	testStateDir = dir
	if from := os.Getenv("NBD_TEST_KERNEL"); from != "" {
		if _, err := Import(dir, from); err != nil {
			return "", err
		}
	}
	return dir, nil
})

// ownState returns a state directory of the test's own, with the kernels of
// testState.
func ownState(t testing.TB) string {
	t.Helper()
	state := t.TempDir()
	shared, err := testState()
	if err == nil {
		err = os.CopyFS(filepath.Join(state, kernelsDir), os.DirFS(filepath.Join(shared, kernelsDir)))
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return state
}

// buildProgram returns the path of a static program.
func buildProgram(t testing.TB, source string, env ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "program")
	build := exec.Command("go", "build", "-trimpath", "-o", path, source)
	build.Env = append(append(os.Environ(), "CGO_ENABLED=0"), env...)
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return path
}

// testInit returns a program that can be a guest's init: this one, unless it was
// built for the race detector and so with a dynamic linker.
var testInit = sync.OnceValues(func() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	if static, err := isStatic(self); err != nil || static {
		return self, err
	}
	dir, err := testState()
	if err != nil {
		return "", err
	}
	init := filepath.Join(dir, "init")
	build := exec.Command("go", "build", "-o", init, "nbd")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build nbd: %w\n%s", err, out)
	}
	return init, nil
})

// newTestRunner returns a Runner that emulates guests.
func newTestRunner(t testing.TB, blobs Blobs, change func(*Config)) *Runner {
	t.Helper()
	if testing.Short() {
		t.Skip("tests that boot guests are left out with -short")
	}
	state, err := testState()
	if err != nil {
		t.Fatal(err)
	}
	init, err := testInit()
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{
		StateDir: state, RuntimeDir: filepath.Join(t.TempDir(), "guests"), Blobs: blobs, Accel: "tcg", Binary: init,
		Logger: slog.New(slog.NewTextHandler(testWriter{t}, nil)),
	}
	if change != nil {
		change(&cfg)
	}
	r, err := New(cfg)
	var missing *MissingError
	if errors.As(err, &missing) {
		t.Fatalf("%v\nThis test boots guests. It needs Debian's qemu-system-x86, busybox-static and a kernel: "+
			"apt install linux-image-cloud-amd64, or apt-get download its package and set NBD_TEST_KERNEL to the file. go test -short does without.", err)
	} else if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		left, err := os.ReadDir(cfg.RuntimeDir)
		if err != nil || len(left) > 0 {
			t.Errorf("left of the guests: %v, %v", left, err)
		}
	})
	return r
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Logf("%s", bytes.TrimSpace(p))
	return len(p), nil
}
