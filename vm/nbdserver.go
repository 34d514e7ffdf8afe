package vm

import (
	"log/slog"
	"net"
)

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

// An NBDServer serves one disk on one socket.
type NBDServer struct{}

// Close closes the socket and all connections, and waits until no read or
// write of the disk is under way.
func (s *NBDServer) Close() error { return nil }

func serveNBD(l net.Listener, e export, log *slog.Logger) *NBDServer { return &NBDServer{} }
