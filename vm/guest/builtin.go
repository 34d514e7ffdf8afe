package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"nbd/vm/guest/builtin"
	"nbd/vm/link"
)

// Nix's builtin builders are this program again (package builtin), which takes
// the place that the program of another builder would have: an execve by the
// build user, behind all filters, without any of the sandbox's privileges. What
// it has to do is its standard input.

// builtinOrder returns what a builtin builder is told; nil if the build has
// another one.
func builtinOrder(order *link.BuildOrder) *builtin.Order {
	if !strings.HasPrefix(order.Builder, link.BuiltinPrefix) {
		return nil
	}
	o := &builtin.Order{Builder: order.Builder, Attrs: order.Env, Outputs: map[string]string{}, Fixed: order.FixedOutput}
	for _, out := range order.Outputs {
		o.Outputs[out.Name] = out.Path
	}
	return o
}

// becomeBuiltin executes a builtin builder. It returns only a failure of ours.
func becomeBuiltin(o *builtin.Order) error {
	text, err := json.Marshal(o)
	if err != nil {
		return fmt.Errorf("encode order of builtin builder: %w", err)
	}
	fd, err := unix.MemfdCreate("order", unix.MFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("make file for builtin builder: %w", err)
	}
	f := os.NewFile(uintptr(fd), "order")
	defer f.Close() // if it fails
	if _, err := f.Write(text); err != nil {
		return fmt.Errorf("write order of builtin builder: %w", err)
	}
	if _, err := f.Seek(0, 0); err != nil {
		return err
	}
	if err := unix.Dup3(fd, 0, 0); err != nil {
		return fmt.Errorf("set standard input of builtin builder: %w", err)
	}
	err = syscall.Exec("/proc/self/exe", []string{link.BuiltinArg0}, nil)
	return fmt.Errorf("execute builtin builder: %w", err)
}

// Builtin is a builtin builder, started by the sandbox with argv[0]
// link.BuiltinArg0. It does not return.
func Builtin() {
	var o builtin.Order
	if err := json.NewDecoder(os.Stdin).Decode(&o); err != nil {
		fmt.Fprintln(os.Stderr, "nbd: error: read order of builtin builder:", err)
		os.Exit(1)
	}
	os.Exit(builtin.Run(context.Background(), &o, os.Stderr))
}

// makeCertificates writes the certificates that a build with a network may
// trust where Nix shows its own; they may be empty.
func (s *stage) makeCertificates(text []byte) error {
	if len(text) == 0 {
		return nil
	}
	file := filepath.Join(s.root(), builtin.CACertificates)
	dir := filepath.Dir(file)
	return errors.Join(os.Mkdir(filepath.Dir(dir), 0o755), os.Mkdir(dir, 0o755), os.WriteFile(file, text, 0o644))
}
