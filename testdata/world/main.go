// World is a builder that prints what it sees of the world, one line each:
// "world KEY = VALUE". What it prints in a sandbox of Nix and in nbd's is
// compared by the script world.txtar. It changes nothing that an output would
// show, and must not depend on time or randomness.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// init keeps to the first thread: some files of /proc tell of that one alone.
func init() { runtime.LockOSThread() }

func main() {
	if len(os.Args) > 1 { // a child of its own, see process.go
		child(os.Args[1])
		return
	}
	environment()
	identity()
	files()
	mounts()
	process()
	kernel()
	terminal()
	memory()
	fileSystems()
	privileges()
	limits()
	network()
	clock()
}

// put prints what was found under a key.
func put(key, format string, args ...any) {
	value := fmt.Sprintf(format, args...)
	if strings.ContainsFunc(value, func(r rune) bool { return r < ' ' || r > '~' }) {
		value = fmt.Sprintf("%q", value)
	}
	fmt.Fprintf(os.Stderr, "world %s = %s\n", key, value)
}

// try prints how something ended: "ok", or the name of its error.
func try(key string, err error) { put(key, "%s", outcome(err)) }

func outcome(err error) string {
	var errno syscall.Errno
	switch {
	case err == nil:
		return "ok"
	case errors.As(err, &errno):
		return unix.ErrnoName(errno)
	case errors.Is(err, io.EOF):
		return "end of file"
	}
	return err.Error()
}

// errnoOf makes the third result of a raw system call an error.
func errnoOf(_, _ uintptr, errno syscall.Errno) error {
	if errno != 0 {
		return errno
	}
	return nil
}

// text returns a file of one line, or why there is none.
func text(name string) string {
	b, err := os.ReadFile(name)
	if err != nil {
		return outcome(err)
	}
	return strings.TrimRight(string(b), "\n")
}

func environment() {
	var names []string
	for _, v := range os.Environ() {
		name, value, _ := strings.Cut(v, "=")
		names = append(names, name)
		put("env "+name, "%s", value)
	}
	put("env order", "%s", strings.Join(names, " "))
	put("env sorted", "%v", slices.IsSorted(names))
}

func identity() {
	r, e, s := unix.Getresuid()
	put("uid", "%d %d %d", r, e, s)
	r, e, s = unix.Getresgid()
	put("gid", "%d %d %d", r, e, s)
	groups, err := unix.Getgroups()
	put("groups", "%v %s", groups, outcome(err))
	for _, name := range []string{"uid_map", "gid_map"} {
		f := strings.Fields(text("/proc/self/" + name))
		if len(f) == 3 {
			put(name+" outside", "%s", f[1])
			f[1] = "-"
		}
		put(name, "%s", strings.Join(f, " "))
	}
	put("setgroups", "%s", text("/proc/self/setgroups"))
	dir, err := os.Getwd()
	put("cwd", "%s %s", dir, outcome(err))
}
