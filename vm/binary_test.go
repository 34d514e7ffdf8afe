package vm

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestCheckStatic(t *testing.T) {
	dir := t.TempDir()
	source := filepath.Join(dir, "main.go")
	if err := os.WriteFile(source, []byte("package main\nfunc main() {}\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := checkStatic(buildProgram(t, source)); err != nil {
		t.Errorf("a static program is refused: %v", err)
	}
	shell, err := exec.LookPath("ssh")
	if err != nil {
		t.Fatalf("ssh is needed, as a program that is not static (Debian: openssh-client): %v", err)
	}
	var missing *MissingError
	if err := checkStatic(shell); !errors.As(err, &missing) {
		t.Errorf("a dynamic program: %v, want a MissingError", err)
	}
	if err := checkStatic(source); err == nil {
		t.Error("what is no program is not refused")
	}
}

// A program runs as well without what lies behind its loaded part.
func TestLoadedSize(t *testing.T) {
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	n, err := loadedSize(bytes.NewReader(self), int64(len(self)))
	if err != nil || n >= int64(len(self)) {
		t.Fatalf("%d of %d bytes, %v", n, len(self), err)
	}
	short := filepath.Join(t.TempDir(), "short")
	if err := os.WriteFile(short, self[:n], 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(short, "-test.list", "^TestLoadedSize$").CombinedOutput(); err != nil || !bytes.Contains(out, []byte("TestLoadedSize")) {
		t.Errorf("%v\n%s", err, out)
	}
	if n, err := loadedSize(strings.NewReader("text"), 4); n != 4 || err != nil {
		t.Errorf("what is no program: %d, %v", n, err)
	}
	if _, err := loadedSize(bytes.NewReader(self), n-1); err == nil {
		t.Error("a program without its end is taken")
	}
}
