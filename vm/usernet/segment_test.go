package usernet

import (
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"
)

// fixTCP makes a segment one of the guest's connection to a port, so that the
// stack looks at all that is in it; its checksum is made with the packet. The
// number that it acknowledges is counted from what the host has sent.
func fixTCP(segment []byte, to uint16, sent uint32) {
	binary.BigEndian.PutUint16(segment, 5000)
	binary.BigEndian.PutUint16(segment[2:], to)
	binary.BigEndian.PutUint32(segment[8:], binary.BigEndian.Uint32(segment[8:])+sent)
	segment[16], segment[17] = 0, 0
}

// segments are parts of a fuzz input: each has its length before it, in one byte.
func segments(parts ...[]byte) (b []byte) {
	for _, p := range parts {
		b = append(append(b, byte(len(p))), p...)
	}
	return b
}

// segment is a TCP header with its options and data.
func segment(seq, ack uint32, flags byte, options, data string) []byte {
	b := append(make([]byte, 4), binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, seq), ack)...)
	b = append(b, byte(5+len(options)/4)<<4, flags, 0xff, 0xff, 0, 0, 0, 0)
	return append(append(b, options...), data...)
}

// Whatever segments a guest makes up, with a host at the other end that echoes,
// the stack goes on.
func FuzzSegments(f *testing.F) {
	const fin, syn, rst, push, ack, urgent = 1, 2, 4, 8, 16, 32
	connect := segment(1, 0, syn, "\x02\x04\x05\xb4\x01\x03\x03\x07\x04\x02\x01\x01", "")
	for _, parts := range [][][]byte{
		{connect, segment(2, 1, ack, "", ""), segment(2, 1, ack|push, "", "hello"), segment(7, 6, ack, "", ""), segment(7, 6, ack|fin, "", "")},
		{connect, segment(2, 1, ack, "", ""), segment(2, 1, rst, "", "")},
		{connect, segment(2, 1, ack|urgent, "\x05\x0a\x00\x00\x00\x01\x00\x00\x00\x02\x01\x01", "x"), connect},
		{segment(1, 0, syn|fin, "", "data"), segment(1, 0, 0xff, "\x02\x00\x00\x00", "")},
	} {
		f.Add(segments(parts...))
	}
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { echo(c.(*net.TCPConn)); c.Close() }()
		}
	}()
	at := netip.MustParseAddrPort(l.Addr().String())
	f.Fuzz(func(t *testing.T, b []byte) {
		g := &segmentGuest{heard: make(chan struct{}, 1)}
		n, conn := linked(t, Config{Rule: rule(t, at.String())})
		go g.listen(conn)
		for count := 0; len(b) > 0 && count < 32; count++ {
			size := min(int(b[0]), len(b)-1)
			s := append([]byte{}, b[1:1+size]...)
			if b = b[1+size:]; size < tcpHeader {
				continue
			}
			fixTCP(s, at.Port(), g.sent.Load())
			if writeFrame(conn, etherIPv4, ipFrom(guest4, gateway4, protoTCP, s)) != nil {
				break
			}
			select { // the next one may need the answer; it need not come
			case <-g.heard:
			case <-time.After(2 * time.Millisecond):
			}
		}
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
}

// A segmentGuest remembers where the host's bytes begin.
type segmentGuest struct {
	sent  atomic.Uint32
	heard chan struct{}
}

func (g *segmentGuest) listen(r io.Reader) {
	for {
		f, err := readFrame(r)
		if err != nil {
			return
		}
		if tcp := f[etherHeader+ipv4Header:]; len(tcp) >= tcpHeader && tcp[13]&2 != 0 {
			g.sent.Store(binary.BigEndian.Uint32(tcp[4:]))
		}
		select {
		case g.heard <- struct{}{}:
		default:
		}
	}
}

// A guest that asks for connections and goes no further holds up nobody's end.
func TestCloseInHandshake(t *testing.T) {
	for range 50 {
		accepted := make(chan struct{}, maxDialing)
		at := server(t, func(c *net.TCPConn) {
			accepted <- struct{}{}
			echo(c)
		})
		n, conn := linked(t, Config{Rule: rule(t, at.String())})
		go discard(conn)
		for i := range 40 {
			if err := writeFrame(conn, etherIPv4, synFrom(guest4, gateway4, uint16(5000+i), at.Port())); err != nil {
				t.Fatal(err)
			}
		}
		for range 20 {
			<-accepted
		}
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	}
}
