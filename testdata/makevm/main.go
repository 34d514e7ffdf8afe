// Makevm makes a virtual machine as whoever runs it, and says so in the file
// $out: what a NixOS test does first.
package main

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	const kvmCreateVM = 0xae01 // linux/kvm.h
	if _, err := unix.IoctlRetInt(int(f.Fd()), kvmCreateVM); err != nil {
		return fmt.Errorf("KVM_CREATE_VM: %w", err)
	}
	return os.WriteFile(os.Getenv("out"), fmt.Appendf(nil, "user %d made a machine\n", os.Getuid()), 0o666)
}
