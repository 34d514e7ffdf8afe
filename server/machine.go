package server

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"nbd/vm"
)

// What the machine really has left for guests: other programs, and the limits of
// the service that the server is, may leave less than --memory says, and disks of
// guests are larger together than what is free. The queue starts no further guest
// where it would be too much.

const (
	// keptMemoryMiB is what guests leave of the memory that is available.
	keptMemoryMiB = 256
	// betweenLooks is the time to the next look at a machine that had too little.
	betweenLooks = 2 * time.Second
	// highPressure is the part of the last ten seconds, in percent, in which
	// nothing went on for lack of memory, from which on no guest is started.
	highPressure = 10.0
)

// A Machine is looked at when a guest is about to be started.
type Machine struct {
	// guestDir is where scratch disks lie, of whose disk minFreeMiB are kept free.
	guestDir   string
	minFreeMiB int
	// inUse tells what guests take now.
	inUse func() vm.Load
	log   *slog.Logger

	proc, cgroups string // "/proc" and where cgroups are mounted
}

// NewMachine returns the machine that this is. Guests have their disks in
// guestDir, of which minFreeMiB are kept free, and inUse tells what they take.
func NewMachine(guestDir string, minFreeMiB int, inUse func() vm.Load, log *slog.Logger) *Machine {
	return &Machine{guestDir: guestDir, minFreeMiB: minFreeMiB, inUse: inUse, log: log, proc: "/proc", cgroups: "/sys/fs/cgroup"}
}

// A machineRoom is what a machine has left, in MiB.
type machineRoom struct {
	memoryMiB, diskMiB             int
	guestsMemoryMiB, guestsDiskMiB int  // that guests have taken of that
	pressed                        bool // programs wait for memory all the time
}

// look returns what looks at the machine the first time it is called, and returns
// the same from then on; false if it could not be found out, which is logged.
func (m *Machine) look() func() (machineRoom, bool) {
	return sync.OnceValues(func() (machineRoom, bool) {
		have, err := m.room()
		if err != nil {
			m.log.Error("cannot find out what is left of the machine", "err", err)
		}
		return have, err == nil
	})
}

// room looks at the machine.
func (m *Machine) room() (r machineRoom, err error) {
	memory, err := m.availableMiB()
	if err != nil {
		return r, err
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(m.guestDir, &fs); err != nil {
		return r, fmt.Errorf("look at disk of guests: %w", err)
	}
	used := m.inUse()
	return machineRoom{
		memoryMiB: memory, diskMiB: int(int64(fs.Bavail)*fs.Bsize>>20) - m.minFreeMiB,
		guestsMemoryMiB: used.MemoryMiB, guestsDiskMiB: used.DiskMiB, pressed: m.pressed(),
	}, nil
}

// availableMiB returns how much memory programs can take without others losing
// theirs: of the machine, or of the cgroups that the server is in.
func (m *Machine) availableMiB() (int, error) {
	return m.leastMiB("MemAvailable", (*memoryGroup).freeMiB)
}

// totalMiB returns how much memory there is for the server and its guests.
func (m *Machine) totalMiB() (int, error) {
	return m.leastMiB("MemTotal", func(g *memoryGroup) int { return int(g.limit >> 20) })
}

// leastMiB returns a field of /proc/meminfo, or what a cgroup that the server is
// in has, if that is less.
func (m *Machine) leastMiB(field string, of func(*memoryGroup) int) (int, error) {
	text, err := os.ReadFile(filepath.Join(m.proc, "meminfo"))
	if err != nil {
		return 0, err
	}
	n, err := parseMeminfo(string(text), field)
	if err != nil {
		return 0, err
	}
	groups, err := m.groups()
	if err != nil {
		return 0, err
	}
	for i := range groups {
		n = min(n, of(&groups[i]))
	}
	return n, nil
}

// parseMeminfo reads the line "NAME: N kB" of /proc/meminfo, in MiB.
func parseMeminfo(text, name string) (int, error) {
	for line := range strings.Lines(text) {
		words := strings.Fields(line)
		if len(words) == 3 && words[0] == name+":" && words[2] == "kB" {
			kib, err := strconv.Atoi(words[1])
			return kib / 1024, err
		}
	}
	return 0, fmt.Errorf("no %s in /proc/meminfo", name)
}

// pressed reports whether nothing has gone on for lack of memory for a part of
// the last seconds (the kernel's documentation, accounting/psi.rst). Kernels may
// not count that.
func (m *Machine) pressed() bool {
	text, err := os.ReadFile(filepath.Join(m.proc, "pressure/memory"))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(text)) {
		words := strings.Fields(line)
		if len(words) > 1 && words[0] == "full" {
			share, err := strconv.ParseFloat(strings.TrimPrefix(words[1], "avg10="), 64)
			return err == nil && share >= highPressure
		}
	}
	return false
}

// A memoryGroup is a cgroup with a limit; in bytes. The kernel takes cache back
// before the limit is met.
type memoryGroup struct{ limit, used, cache int64 }

func (g *memoryGroup) freeMiB() int { return int((g.limit - max(0, g.used-g.cache)) >> 20) }

// groups returns the cgroups that the server is in, of those that limit memory.
func (m *Machine) groups() (list []memoryGroup, err error) {
	text, err := os.ReadFile(filepath.Join(m.proc, "self/cgroup"))
	if os.IsNotExist(err) {
		return nil, nil // a kernel without cgroups
	} else if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(text)) {
		controllers, path, ok := cutGroup(line)
		switch {
		case !ok:
		case controllers == "": // version 2
			list = append(list, limitedGroups(m.cgroups, path, "memory.max", "memory.current", "inactive_file")...)
		case strings.Contains(","+controllers+",", ",memory,"):
			list = append(list, limitedGroups(filepath.Join(m.cgroups, "memory"), path,
				"memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")...)
		}
	}
	return list, nil
}

// cutGroup splits a line of /proc/self/cgroup.
func cutGroup(line string) (controllers, path string, ok bool) {
	_, rest, ok := strings.Cut(strings.TrimSpace(line), ":")
	if !ok {
		return "", "", false
	}
	controllers, path, ok = strings.Cut(rest, ":")
	return controllers, filepath.Clean("/" + path), ok
}

// limitedGroups returns the group at path, and those that it lies in, that have a
// limit. Files that are not there are those of a group that limits nothing: the
// topmost one, and those that a container does not show.
func limitedGroups(mount, path, limit, used, cache string) (list []memoryGroup) {
	for ; ; path = filepath.Dir(path) {
		dir := filepath.Join(mount, path)
		if n, ok := readNumber(filepath.Join(dir, limit)); ok && n < unlimited {
			g := memoryGroup{limit: n}
			if g.used, ok = readNumber(filepath.Join(dir, used)); ok {
				g.cache = statOf(filepath.Join(dir, "memory.stat"), cache)
				list = append(list, g)
			}
		}
		if path == "/" {
			return list
		}
	}
}

// unlimited is less than what version 1 says where there is no limit.
const unlimited = 1 << 60

// readNumber reads a file that is one number; false for any other, such as "max".
func readNumber(path string) (int64, bool) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	return n, err == nil
}

// statOf reads a line "NAME N" of a file; 0 if it has none.
func statOf(path, name string) int64 {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), name+" "); ok {
			n, _ := strconv.ParseInt(value, 10, 64)
			return n
		}
	}
	return 0
}
