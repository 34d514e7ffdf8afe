package guest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"nbd/vm/link"
)

// Guests that are to run guests find out, before a template is saved, whether
// the build user can make a virtual machine.

const kvmDevice = "/dev/kvm"

// Requests of /dev/kvm, linux/kvm.h.
const (
	kvmGetAPIVersion = 0xae00
	kvmCreateVM      = 0xae01
	kvmAPIVersion    = 12
)

// loadKVM loads the modules that a guest which is to run guests has; others have
// not even the folder. Of the modules some are for other processors, so a failure
// is told on the console, and what counts is tried by tryKVM.
func loadKVM(dir string) (wanted bool, err error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	} else if err != nil {
		return false, fmt.Errorf("load modules: %w", err)
	}
	for _, e := range entries {
		if err := loadModule(filepath.Join(dir, e.Name())); err != nil {
			fmt.Fprintln(os.Stderr, "nbd guest: load module", e.Name()+":", err)
		}
	}
	return true, os.RemoveAll(dir)
}

// tryKVM makes /dev/kvm everybody's and has the build user make a virtual
// machine. It reports whether that worked, and why not on the console.
func tryKVM() bool {
	err := os.Chmod(kvmDevice, 0o666)
	if err == nil {
		probe := exec.Cmd{
			Path: "/proc/self/exe", Args: []string{link.KVMProbeArg0}, Env: []string{}, Dir: "/", Stderr: os.Stderr,
			SysProcAttr: &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: builderUID, Gid: builderGID, Groups: []uint32{}}},
		}
		err = probe.Run()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "nbd guest: no virtual machine can be made:", err)
	}
	return err == nil
}

// probeKVM is the process of the build user that makes a virtual machine.
func probeKVM() {
	if err := makeVM(kvmDevice); err != nil {
		fmt.Fprintln(os.Stderr, "nbd guest:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// makeVM makes a virtual machine, which ends at once.
func makeVM(device string) error {
	fd, err := unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", device, err)
	}
	defer unix.Close(fd)
	version, err := unix.IoctlRetInt(fd, kvmGetAPIVersion)
	if err != nil || version != kvmAPIVersion {
		return errors.Join(fmt.Errorf("%s has the version %d and not %d", device, version, kvmAPIVersion), err)
	}
	machine, err := unix.IoctlRetInt(fd, kvmCreateVM)
	if err != nil {
		return fmt.Errorf("KVM_CREATE_VM: %w", err)
	}
	return unix.Close(machine)
}
