package guest

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"nbd/vm/link"
)

// sinkBuffer is how much is written at once. With direct writes of that size a
// byte costs a tenth of what it costs through the page cache or a port.
const sinkBuffer = 1 << 20

// A sink writes NARs to the output disk, one after the other from its start.
type sink struct {
	fd  int
	buf []byte // aligned to pages, as direct writes must be
	n   int    // bytes of buf that wait
	off int64  // where buf goes to

	size int64 // bytes of the current NAR
}

// openSink opens the output disk. Close it.
func openSink(dev string) (*sink, error) {
	fd, err := unix.Open(dev, unix.O_WRONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open output disk: %w", err)
	}
	buf, err := unix.Mmap(-1, 0, sinkBuffer, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open output disk: %w", err), unix.Close(fd))
	}
	return &sink{fd: fd, buf: buf}, nil
}

// Write takes bytes of the current NAR.
func (s *sink) Write(b []byte) (int, error) {
	s.size += int64(len(b))
	for rest := b; len(rest) > 0; {
		n := copy(s.buf[s.n:], rest)
		s.n += n
		rest = rest[n:]
		if s.n == len(s.buf) {
			if err := s.spill(); err != nil {
				return len(b) - len(rest), err
			}
		}
	}
	return len(b), nil
}

// end ends the current NAR and begins the next one.
func (s *sink) end(name string) (link.OutputInfo, error) {
	info := link.OutputInfo{Name: name, Size: s.size}
	s.size = 0
	if over := s.n % link.OutputAlign; over != 0 {
		clear(s.buf[s.n : s.n+link.OutputAlign-over])
		s.n += link.OutputAlign - over
	}
	if s.n == len(s.buf) {
		return info, s.spill()
	}
	return info, nil
}

// flush makes everything written durable on the host's side.
func (s *sink) flush() error {
	if err := s.spill(); err != nil {
		return err
	}
	if err := unix.Fsync(s.fd); err != nil {
		return fmt.Errorf("flush outputs: %w", err)
	}
	return nil
}

// spill writes what waits, which is a multiple of OutputAlign.
func (s *sink) spill() error {
	for done := 0; done < s.n; {
		n, err := unix.Pwrite(s.fd, s.buf[done:s.n], s.off)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err == nil && n == 0 {
			err = unix.ENOSPC
		}
		if err != nil {
			return fmt.Errorf("write outputs: %w", err)
		}
		done += n
		s.off += int64(n)
	}
	s.n = 0
	return nil
}

func (s *sink) close() error {
	return errors.Join(unix.Munmap(s.buf), unix.Close(s.fd))
}
