package main

import (
	"os"
	"os/exec"

	"golang.org/x/sys/unix"
)

func memory() {
	for _, dir := range []string{"/build", "/dev/shm", "/tmp"} {
		try("shared map "+dir, sharedMap(dir))
		try("run from "+dir, runFrom(dir))
	}
	fd, err := unix.MemfdCreate("x", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	try("memfd", err)
	if err == nil {
		unix.Close(fd)
	}
	const memfdSecret = 447 // on all machines
	try("memfd_secret", closing(unix.Syscall(memfdSecret, 0, 0, 0)))
	b, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANON)
	try("map to write and execute", err)
	if err == nil {
		try("lock memory", unix.Mlock(b))
		try("execute", unix.Mprotect(b, unix.PROT_READ|unix.PROT_EXEC))
		unix.Munmap(b)
	}
	_, err = unix.Mmap(-1, 0, 2<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_HUGETLB)
	try("map huge pages", err)
}

// sharedMap writes to a file in dir through one mapping and reads through
// another.
func sharedMap(dir string) error {
	f, err := os.CreateTemp(dir, "map")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if err := f.Truncate(8192); err != nil {
		return err
	}
	a, err := unix.Mmap(int(f.Fd()), 0, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	defer unix.Munmap(a)
	b, err := unix.Mmap(int(f.Fd()), 0, 8192, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	defer unix.Munmap(b)
	a[5000] = 7
	if b[5000] != 7 {
		return unix.EIO
	}
	return unix.Msync(a, unix.MS_SYNC)
}

func runFrom(dir string) error {
	b, err := os.ReadFile("/bin/sh")
	if err != nil {
		return err
	}
	program := dir + "/world-sh"
	if err := os.WriteFile(program, b, 0o755); err != nil {
		return err
	}
	defer os.Remove(program)
	cmd := exec.Command(program, "-c", "exit 0")
	cmd.Args[0] = "sh"
	return cmd.Run()
}
