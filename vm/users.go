package vm

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// ids hands out the user ids of guests: one that has broken out of QEMU meets
// neither the server's files nor another guest's process.
type ids struct {
	first int // negative: guests run as the server's own user

	mu   sync.Mutex
	used []bool
}

// newIDs returns n ids from first, or none and why when this process may not
// change its user.
func newIDs(first, n int) (*ids, error) {
	if err := mayChangeUser(first, n); err != nil {
		return &ids{first: -1}, err
	}
	return &ids{first: first, used: make([]bool, n)}, nil
}

// take returns an id that no other guest has, and what gives it back; -1 stands
// for the server's own.
func (s *ids) take() (id int, release func(), err error) {
	if s.first < 0 {
		return -1, func() {}, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, used := range s.used {
		if !used {
			s.used[i] = true
			return s.first + i, func() {
				s.mu.Lock()
				defer s.mu.Unlock()
				s.used[i] = false
			}, nil
		}
	}
	return 0, nil, fmt.Errorf("all %d user ids of guests are in use", len(s.used))
}

// mayChangeUser reports why processes cannot be started under the given ids.
func mayChangeUser(first, n int) error {
	if os.Geteuid() != 0 {
		return errors.New("the server does not run as root")
	}
	for _, file := range []string{"/proc/self/uid_map", "/proc/self/gid_map"} {
		b, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		if !idsMapped(string(b), first, n) {
			return fmt.Errorf("the ids %d to %d do not exist in this user namespace", first, first+n-1)
		}
	}
	return nil
}

// idsMapped reports whether n ids from first lie in one line of a uid_map
// (user_namespaces(7)).
func idsMapped(table string, first, n int) bool {
	lines := bufio.NewScanner(strings.NewReader(table))
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) != 3 {
			continue
		}
		from, err1 := strconv.Atoi(f[0])
		length, err2 := strconv.Atoi(f[2])
		if err1 == nil && err2 == nil && first >= from && first+n <= from+length {
			return true
		}
	}
	return false
}

// kvmGroup returns the group under which a process with the given id, which has
// no other group, can open /dev/kvm, or why there is none. It is never root's.
func kvmGroup(id int) (int, error) {
	info, err := os.Stat(kvmDevice)
	if err != nil {
		return 0, err
	}
	return deviceGroup(id, info.Mode().Perm(), int(info.Sys().(*syscall.Stat_t).Gid))
}

// deviceGroup is kvmGroup for a device with that mode and group.
func deviceGroup(id int, mode os.FileMode, group int) (int, error) {
	switch {
	case id < 0 || mode&0o006 == 0o006:
		return id, nil
	case mode&0o060 == 0o060 && group != 0:
		return group, nil
	}
	return 0, fmt.Errorf("the user ids of guests may not open %s: give it a group of its own (chgrp kvm %s; chmod 660 %s)", kvmDevice, kvmDevice, kvmDevice)
}
