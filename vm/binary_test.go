package vm

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

func TestCheckStatic(t *testing.T) {
	dir := t.TempDir()
	source := filepath.Join(dir, "main.go")
	if err := os.WriteFile(source, []byte("package main\nfunc main() {}\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	static := filepath.Join(dir, "static")
	build := exec.Command("go", "build", "-o", static, source)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := checkStatic(static); err != nil {
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
