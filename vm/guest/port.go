package guest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// portDeadline is how long the driver may take to show a port after boot.
const portDeadline = 20 * time.Second

// A port is one virtio-serial port. While no host is connected its reads and
// writes wait; so a guest does not notice that it was saved and restored in
// between. One goroutine may read while another one writes.
type port struct {
	f  *os.File
	rc syscall.RawConn
}

// openPort opens the port of that name, which appears some time after its
// driver was loaded.
func openPort(name string) (*port, error) {
	dev, err := waitFor(portDeadline, func() (string, bool, error) { return findPort(name) })
	if err != nil {
		return nil, fmt.Errorf("open port %s: %w", name, err)
	}
	// Non-blocking, so that the runtime's poller waits and not a thread.
	f, err := os.OpenFile(filepath.Join("/dev", dev), os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open port %s: %w", name, err)
	}
	rc, err := f.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("open port %s: %w", name, err)
	}
	return &port{f: f, rc: rc}, nil
}

// findPort looks for the device of the port of that name.
func findPort(name string) (dev string, ok bool, err error) {
	names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return "", false, err
	}
	for _, file := range names {
		b, err := os.ReadFile(file)
		if err != nil {
			return "", false, err
		}
		if strings.TrimSpace(string(b)) == name {
			dev := filepath.Base(filepath.Dir(file))
			if _, err := os.Stat(filepath.Join("/dev", dev)); err == nil {
				return dev, true, nil
			}
		}
	}
	return "", false, nil
}

// waitFor calls find until it is ok. Nothing in sysfs tells of a change, and
// the devices of a machine that has booted are there at the first call.
func waitFor(deadline time.Duration, find func() (string, bool, error)) (string, error) {
	for start := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		found, ok, err := find()
		if err != nil || ok {
			return found, err
		}
		if time.Since(start) > deadline {
			return "", errors.New("no such device")
		}
	}
}

// Read reads at least one byte. A port that has no host reads as ended; that is
// no end here: the poller tells when there is data.
func (p *port) Read(b []byte) (n int, err error) {
	if len(b) == 0 {
		return 0, nil
	}
	waitErr := p.rc.Read(func(fd uintptr) bool {
		n, err = unix.Read(int(fd), b)
		return n > 0 || err != nil && err != unix.EAGAIN && err != unix.EINTR
	})
	return max(n, 0), errors.Join(err, waitErr)
}

// Write writes all of b.
func (p *port) Write(b []byte) (int, error) { return p.f.Write(b) }

var _ io.ReadWriter = (*port)(nil)
