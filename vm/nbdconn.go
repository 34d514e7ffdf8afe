package vm

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
)

// Numbers of the transmission phase.
const (
	nbdRequestMagic = 0x25609513
	nbdSimpleMagic  = 0x67446698

	nbdCmdRead        = 0
	nbdCmdWrite       = 1
	nbdCmdDisc        = 2
	nbdCmdFlush       = 3
	nbdCmdTrim        = 4
	nbdCmdWriteZeroes = 6

	nbdEPERM  = 1
	nbdEIO    = 5
	nbdEINVAL = 22
	nbdENOSPC = 28

	nbdRequestSize = 28
	nbdReplySize   = 16
)

const (
	// nbdMaxRequest is the largest request that is answered, in bytes: the
	// default of the specification, and QEMU's own bound.
	nbdMaxRequest = 32 << 20
	// nbdBuffer is how much of a request is in memory at a time. Linux reads
	// 128 KiB ahead unless told otherwise.
	nbdBuffer = 256 << 10
	// nbdWorkers is how many reads of one connection are under way at a time.
	nbdWorkers = 16
)

// nbdBuffers holds *[nbdReplySize + nbdBuffer]byte: a reply and its data, or a
// part of a write.
var nbdBuffers = sync.Pool{New: func() any { return new([nbdReplySize + nbdBuffer]byte) }}

// An nbdRequest is what a client asked for; data of a write are not part of it.
type nbdRequest struct {
	command uint16
	handle  uint64 // the client's, sent back
	off     uint64
	length  uint32
}

// An nbdConn is one connection. Its own goroutine reads requests and does all
// but reads, which workers do; there is at most one worker for each read.
type nbdConn struct {
	conn net.Conn
	r    *bufio.Reader
	disk export

	reads   chan nbdRequest
	workers sync.WaitGroup
	started int // workers

	sending sync.Mutex // one reply at a time
}

func newNBDConn(c net.Conn, disk export) *nbdConn {
	return &nbdConn{conn: c, r: bufio.NewReaderSize(c, 16<<10), disk: disk, reads: make(chan nbdRequest)}
}

// serve runs the connection to its end. It returns nil when the client left.
func (c *nbdConn) serve() error {
	defer c.workers.Wait()
	defer close(c.reads)
	err := c.handshake()
	for err == nil {
		var r nbdRequest
		if r, err = c.readRequest(); err == nil {
			err = c.do(r)
		}
	}
	if errors.Is(err, errNBDEnd) || errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// readRequest reads the next request.
func (c *nbdConn) readRequest() (r nbdRequest, err error) {
	// Peek, for no allocation.
	b, err := c.r.Peek(nbdRequestSize)
	if err != nil {
		if err == io.EOF && len(b) > 0 {
			err = io.ErrUnexpectedEOF
		}
		return r, err
	}
	be := binary.BigEndian
	if be.Uint32(b) != nbdRequestMagic {
		return r, errors.New("bad magic of a request")
	}
	r = nbdRequest{be.Uint16(b[6:]), be.Uint64(b[8:]), be.Uint64(b[16:]), be.Uint32(b[24:])}
	_, err = c.r.Discard(nbdRequestSize)
	return r, err
}

// do does one request, or hands it to a worker.
func (c *nbdConn) do(r nbdRequest) error {
	fits := r.off <= DiskSize && uint64(r.length) <= DiskSize-r.off
	switch r.command {
	case nbdCmdRead:
		if !fits || r.length > nbdMaxRequest {
			return c.reply(r, nbdEINVAL)
		}
		c.dispatch(r)
		return nil
	case nbdCmdWrite:
		return c.write(r, fits)
	case nbdCmdDisc:
		return errNBDEnd
	case nbdCmdFlush:
		return c.reply(r, 0)
	case nbdCmdTrim, nbdCmdWriteZeroes:
		// Neither changes anything: a sink reads as zeros wherever it may be
		// read at all, and what was appended stays.
		switch {
		case !c.disk.writable():
			return c.reply(r, nbdEPERM)
		case !fits:
			return c.reply(r, nbdEINVAL)
		}
		return c.reply(r, 0)
	}
	return c.reply(r, nbdEINVAL)
}

// reply answers a request without data; errno 0 is success.
func (c *nbdConn) reply(r nbdRequest, errno uint32) error {
	var b [nbdReplySize]byte
	putNBDReply(b[:], r, errno)
	c.sending.Lock()
	defer c.sending.Unlock()
	_, err := c.conn.Write(b[:])
	return err
}

// putNBDReply writes the head of a reply to b.
func putNBDReply(b []byte, r nbdRequest, errno uint32) {
	binary.BigEndian.PutUint32(b, nbdSimpleMagic)
	binary.BigEndian.PutUint32(b[4:], errno)
	binary.BigEndian.PutUint64(b[8:], r.handle)
}

// write does a write. A client may send data of any length before it knows the
// answer; what is not wanted is read and forgotten.
func (c *nbdConn) write(r nbdRequest, fits bool) error {
	errno := uint32(0)
	switch {
	case r.length > nbdMaxRequest:
		return fmt.Errorf("write of %d bytes", r.length)
	case !c.disk.writable():
		errno = nbdEPERM
	case !fits:
		errno = nbdENOSPC
	}
	buf := nbdBuffers.Get().(*[nbdReplySize + nbdBuffer]byte)
	defer nbdBuffers.Put(buf)
	off := int64(r.off)
	for left := int(r.length); left > 0; {
		b := buf[:min(left, nbdBuffer)]
		if _, err := io.ReadFull(c.r, b); err != nil {
			return fmt.Errorf("read data of a write: %w", err)
		}
		if errno == 0 && c.disk.write(b, off) != nil {
			errno = nbdEIO // the disk remembers why
		}
		off += int64(len(b))
		left -= len(b)
	}
	return c.reply(r, errno)
}

// dispatch hands a read to a worker that is idle, to a new one, or waits for
// one.
func (c *nbdConn) dispatch(r nbdRequest) {
	if c.started < nbdWorkers {
		select {
		case c.reads <- r:
			return
		default:
			c.started++
			c.workers.Go(func() { c.work(r) })
			return
		}
	}
	c.reads <- r
}

// work does reads until the connection ends.
func (c *nbdConn) work(r nbdRequest) {
	for ok := true; ok; r, ok = <-c.reads {
		if err := c.read(r); err != nil {
			// It ends the loop of serve, too. Requests that were read already
			// fail here likewise, until the channel is closed.
			_ = c.conn.Close()
		}
	}
}

// read answers a read. An error ends the connection.
func (c *nbdConn) read(r nbdRequest) error {
	buf := nbdBuffers.Get().(*[nbdReplySize + nbdBuffer]byte)
	defer nbdBuffers.Put(buf)
	off, left := int64(r.off), int(r.length)
	b := buf[:nbdReplySize+min(left, nbdBuffer)]
	if c.disk.read(b[nbdReplySize:], off) != nil {
		return c.reply(r, nbdEIO) // the disk remembers why
	}
	putNBDReply(b, r, 0)
	c.sending.Lock()
	defer c.sending.Unlock()
	for {
		if _, err := c.conn.Write(b); err != nil {
			return err
		}
		n := len(b)
		if &b[0] == &buf[0] {
			n -= nbdReplySize
		}
		off += int64(n)
		if left -= n; left == 0 {
			return nil
		}
		// A simple reply cannot say that data will be missing: then only the end
		// of the connection tells.
		b = buf[nbdReplySize:][:min(left, nbdBuffer)]
		if err := c.disk.read(b, off); err != nil {
			return err
		}
	}
}
