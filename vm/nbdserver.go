package vm

import (
	"errors"
	"log/slog"
	"net"
	"sync"
)

// The Network Block Device protocol, as far as QEMU's client, qemu-img and
// nbd-client need it of a local disk: the fixed newstyle handshake without TLS,
// and simple replies. It is specified by
// https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md. All
// numbers are big endian.
//
// The client is QEMU, which a guest may have taken over: it may say anything,
// and costs at most one connection's memory (nbdWorkers buffers of nbdBuffer
// bytes) until the server is closed.

// nbdMaxConns is how many connections one disk has at most. QEMU opens one; the
// rest is for tools.
const nbdMaxConns = 8

// An export is a disk of DiskSize bytes as the server sees it. Ranges that it
// is asked for lie within the disk.
type export interface {
	// writable says whether clients may write.
	writable() bool
	// read fills p. It is called from several goroutines at once.
	read(p []byte, off int64) error
	// write takes p, and keeps no reference to it. Within one connection calls
	// come in the order in which the client sent the bytes; a large request
	// comes in several calls.
	write(p []byte, off int64) error
}

// An NBDServer serves one disk on one listener.
type NBDServer struct {
	disk     export
	listener net.Listener
	log      *slog.Logger
	wg       sync.WaitGroup // accepting, and one for each connection

	// mu guards what follows.
	mu     sync.Mutex
	closed bool
	conns  map[net.Conn]struct{}
}

// serveNBD serves disk until Close.
func serveNBD(l net.Listener, disk export, log *slog.Logger) *NBDServer {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	s := &NBDServer{disk: disk, listener: l, log: log, conns: make(map[net.Conn]struct{})}
	s.wg.Go(s.accept)
	return s
}

// Close closes the listener and all connections, and waits until no read or
// write of the disk is under way. Only the first call returns an error.
func (s *NBDServer) Close() error {
	s.mu.Lock()
	first := !s.closed
	s.closed = true
	for c := range s.conns {
		// A connection that its client closed, too, is closed enough.
		_ = c.Close()
	}
	s.mu.Unlock()
	err := s.listener.Close()
	s.wg.Wait()
	if !first || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// accept serves each client that connects.
func (s *NBDServer) accept() {
	for {
		c, err := s.listener.Accept()
		if err != nil {
			if !errors.Is(err, net.ErrClosed) && !s.isClosed() {
				s.log.Error("accept disk client", "err", err)
			}
			return
		}
		if !s.enter(c) {
			// The client learns of it by the end of the connection.
			_ = c.Close()
			continue
		}
		s.wg.Go(func() { s.serve(c) })
	}
}

func (s *NBDServer) isClosed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}

// enter takes note of a connection, unless there are too many or the server is
// closed.
func (s *NBDServer) enter(c net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || len(s.conns) >= nbdMaxConns {
		return false
	}
	s.conns[c] = struct{}{}
	return true
}

// serve serves one connection to its end.
func (s *NBDServer) serve(c net.Conn) {
	err := newNBDConn(c, s.disk).serve()
	s.mu.Lock()
	delete(s.conns, c)
	closed := s.closed
	s.mu.Unlock()
	// What was read and written is told by serve's error.
	_ = c.Close()
	if err != nil && !closed {
		// A killed guest ends like this, and a disk remembers its own errors.
		s.log.Debug("disk client ended", "err", err)
	}
}
