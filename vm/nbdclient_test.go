package vm

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"sync"
	"testing"
)

// listenNBD returns a listener in a directory of the test's own, and its path.
func listenNBD(t testing.TB) (net.Listener, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	return l, path
}

// serveTest serves a disk for the time of the test and returns its socket.
func serveTest(t testing.TB, disk export) string {
	t.Helper()
	l, path := listenNBD(t)
	s := serveNBD(l, disk, nil)
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return path
}

// An errno is an error that a server replied with.
type errno uint32

func (e errno) Error() string { return fmt.Sprintf("errno %d", uint32(e)) }

// An nbdClient is a client that says what tests want. After connect it may be
// used by several goroutines.
type nbdClient struct {
	conn  net.Conn
	r     *bufio.Reader
	flags uint16

	// mu guards what follows.
	mu      sync.Mutex
	handle  uint64
	waiting map[uint64]*nbdCall
	err     error // why the connection ended
}

// An nbdCall is a request without an answer yet.
type nbdCall struct {
	data []byte // to be filled by a read
	done chan error
}

// dialNBD connects, without a handshake.
func dialNBD(t testing.TB, path string) *nbdClient {
	t.Helper()
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &nbdClient{conn: conn, r: bufio.NewReader(conn), waiting: make(map[uint64]*nbdCall)}
}

// connectNBD connects and begins the transmission phase.
func connectNBD(t testing.TB, path string) *nbdClient {
	t.Helper()
	c := dialNBD(t, path)
	if err := c.hello(3); err != nil {
		t.Fatal(err)
	}
	replies, err := c.option(nbdOptGo, goData("", nbdInfoBlockSize))
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range replies {
		if r.kind == nbdRepInfo && binary.BigEndian.Uint16(r.data) == nbdInfoExport {
			c.flags = binary.BigEndian.Uint16(r.data[10:])
		}
	}
	if last := replies[len(replies)-1]; last.kind != nbdRepAck {
		t.Fatalf("NBD_OPT_GO ended with %#x", last.kind)
	}
	go c.receive()
	return c
}

// hello reads the server's greeting and answers with flags.
func (c *nbdClient) hello(flags uint32) error {
	var b [18]byte
	if _, err := io.ReadFull(c.r, b[:]); err != nil {
		return err
	}
	if string(b[:16]) != "NBDMAGICIHAVEOPT" || binary.BigEndian.Uint16(b[16:]) != 3 {
		return fmt.Errorf("greeting %q", b)
	}
	_, err := c.conn.Write(binary.BigEndian.AppendUint32(nil, flags))
	return err
}

// An optReply is one reply to an option.
type optReply struct {
	kind uint32
	data []byte
}

// optionBytes returns an option as it is sent.
func optionBytes(opt uint32, data []byte) []byte {
	b := binary.BigEndian.AppendUint64(nil, nbdOptMagic)
	b = binary.BigEndian.AppendUint32(b, opt)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// goData returns the data of NBD_OPT_GO and NBD_OPT_INFO.
func goData(name string, infos ...uint16) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(name)))
	b = append(b, name...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(infos)))
	for _, i := range infos {
		b = binary.BigEndian.AppendUint16(b, i)
	}
	return b
}

// option sends an option and returns its replies, up to an acknowledgement or
// an error.
func (c *nbdClient) option(opt uint32, data []byte) (replies []optReply, err error) {
	if _, err := c.conn.Write(optionBytes(opt, data)); err != nil {
		return nil, err
	}
	for {
		var h [20]byte
		if _, err := io.ReadFull(c.r, h[:]); err != nil {
			return replies, err
		}
		be := binary.BigEndian
		if be.Uint64(h[:]) != nbdReplyMagic || be.Uint32(h[8:]) != opt {
			return replies, fmt.Errorf("head of a reply %x", h)
		}
		r := optReply{be.Uint32(h[12:]), make([]byte, be.Uint32(h[16:]))}
		if _, err := io.ReadFull(c.r, r.data); err != nil {
			return replies, err
		}
		replies = append(replies, r)
		if r.kind == nbdRepAck || r.kind >= nbdRepErr {
			return replies, nil
		}
	}
}

// requestBytes returns the head of a request.
func requestBytes(r nbdRequest) []byte {
	b := binary.BigEndian.AppendUint32(nil, nbdRequestMagic)
	b = binary.BigEndian.AppendUint16(b, 0)
	b = binary.BigEndian.AppendUint16(b, r.command)
	b = binary.BigEndian.AppendUint64(b, r.handle)
	b = binary.BigEndian.AppendUint64(b, r.off)
	return binary.BigEndian.AppendUint32(b, r.length)
}

// call sends a request; payload are the data of a write, data what a read fills.
func (c *nbdClient) call(command uint16, off uint64, length uint32, payload, data []byte) (*nbdCall, error) {
	call := &nbdCall{data: data, done: make(chan error, 1)}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return nil, c.err
	}
	c.handle++
	c.waiting[c.handle] = call
	b := net.Buffers{requestBytes(nbdRequest{command, c.handle, off, length}), payload}
	_, err := b.WriteTo(c.conn)
	return call, err
}

// do sends a request and waits for the answer.
func (c *nbdClient) do(command uint16, off uint64, length uint32, payload, data []byte) error {
	call, err := c.call(command, off, length, payload, data)
	if err != nil {
		return err
	}
	return <-call.done
}

func (c *nbdClient) read(p []byte, off int64) error {
	return c.do(nbdCmdRead, uint64(off), uint32(len(p)), nil, p)
}

func (c *nbdClient) write(p []byte, off int64) error {
	return c.do(nbdCmdWrite, uint64(off), uint32(len(p)), p, nil)
}

// receive hands answers to who waits for them, until the connection ends.
func (c *nbdClient) receive() {
	err := c.receiveAll()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = err
	for _, call := range c.waiting {
		call.done <- err
	}
}

func (c *nbdClient) receiveAll() error {
	for {
		var h [nbdReplySize]byte
		if _, err := io.ReadFull(c.r, h[:]); err != nil {
			return err
		}
		be := binary.BigEndian
		if be.Uint32(h[:]) != nbdSimpleMagic {
			return fmt.Errorf("head of a reply %x", h)
		}
		c.mu.Lock()
		call := c.waiting[be.Uint64(h[8:])]
		delete(c.waiting, be.Uint64(h[8:]))
		c.mu.Unlock()
		if call == nil {
			return errors.New("reply to nothing")
		}
		if e := be.Uint32(h[4:]); e != 0 {
			call.done <- errno(e)
			continue
		}
		_, err := io.ReadFull(c.r, call.data)
		call.done <- err
		if err != nil {
			return err
		}
	}
}
