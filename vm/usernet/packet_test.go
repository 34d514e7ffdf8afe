package usernet

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
)

// discard reads what comes to the guest, until its link ends.
func discard(r io.Reader) {
	_, _ = io.Copy(io.Discard, r)
}

// ipFrom is an IP packet of the guest, with its header's checksum.
func ipFrom(src, dst netip.Addr, proto byte, payload []byte) []byte {
	return ipFrame(src, dst, proto, payload)[etherHeader:]
}

func udpFrom(src, dst netip.Addr, from, to uint16, data []byte) []byte {
	return udpFrame(src, dst, from, to, data)[etherHeader:]
}

// synFrom is a request for a connection.
func synFrom(src, dst netip.Addr, from, to uint16) []byte {
	b := binary.BigEndian.AppendUint16(nil, from)
	b = binary.BigEndian.AppendUint16(b, to)
	b = append(b, 0, 0, 0, 1, 0, 0, 0, 0, 5<<4, 2, 0xff, 0xff, 0, 0, 0, 0)
	return ipFrom(src, dst, protoTCP, b)
}

// arp is a question for who has an address.
func arp(target netip.Addr) []byte {
	b := append([]byte{0, 1, 8, 0, 6, 4, 0, 1}, guestMAC[:]...)
	b = append(b, guest4.AsSlice()...)
	b = append(b, make([]byte, 6)...)
	return append(b, target.AsSlice()...)
}

var public = netip.MustParseAddr("8.8.8.8")

// The gateway answers for itself, and what is no TCP is refused at once.
func TestReplies(t *testing.T) {
	_, conn := linked(t, Config{ipv6: new(true)})
	exchange := func(etherType uint16, data []byte) []byte {
		t.Helper()
		go writeFrame(conn, etherType, data)
		f, err := readFrame(conn)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(f[:6], guestMAC[:]) || !bytes.Equal(f[6:12], gatewayMAC[:]) || binary.BigEndian.Uint16(f[12:]) != etherType {
			t.Fatalf("frame %x", f)
		}
		return f[etherHeader:]
	}
	if got := exchange(etherARP, arp(gateway4)); got[7] != 2 || !bytes.Equal(got[8:14], gatewayMAC[:]) || !bytes.Equal(got[14:18], gateway4.AsSlice()) {
		t.Errorf("ARP: %x", got)
	}
	ask := append([]byte{135, 0, 0, 0, 0, 0, 0, 0}, gateway6.AsSlice()...)
	if got := exchange(etherIPv6, ipFrom(guest6, gateway6, protoICMPv6, ask))[ipv6Header:]; got[0] != 136 || !bytes.Equal(got[8:24], gateway6.AsSlice()) || !bytes.Equal(got[26:32], gatewayMAC[:]) {
		t.Errorf("neighbour: %x", got)
	}
	sent := udpFrom(guest4, public, 5000, 123, []byte("time?"))
	got := exchange(etherIPv4, sent)
	if got[ipv4Header] != 3 || got[ipv4Header+1] != 3 || !bytes.Equal(got[ipv4Header+8:], sent[:ipv4Header+udpHeader]) ||
		checksum.Checksum(got[:ipv4Header], 0) != 0xffff || checksum.Checksum(got[ipv4Header:], 0) != 0xffff {
		t.Errorf("UDP: %x", got)
	}
	sent = udpFrom(guest6, netip.MustParseAddr("2a01:4f8::1"), 5000, 53, []byte("name?"))
	if got := exchange(etherIPv6, sent); got[ipv6Header] != 1 || got[ipv6Header+1] != 4 || !bytes.Equal(got[ipv6Header+8:], sent[:ipv6Header+udpHeader]) {
		t.Errorf("UDP over IPv6: %x", got)
	}
}

// badFrames are frames that nobody answers.
func badFrames() map[string][]byte {
	frame := func(etherType uint16, data []byte) []byte {
		return append(append(append(gatewayMAC[:], guestMAC[:]...), byte(etherType>>8), byte(etherType)), data...)
	}
	edit := func(data []byte, at int, value ...byte) []byte {
		data = bytes.Clone(data)
		copy(data[at:], value)
		if data[0]>>4 == 4 { // its header shall be right otherwise
			copy(data[10:], []byte{0, 0})
			binary.BigEndian.PutUint16(data[10:], ^checksum.Checksum(data[:ipv4Header], 0))
		}
		return data
	}
	syn := synFrom(guest4, public, 5000, 81)
	other := netip.MustParseAddr("192.0.0.3")
	spoofedMAC := frame(etherIPv4, syn)
	copy(spoofedMAC[6:], gatewayMAC[:])
	v6 := netip.MustParseAddr("2a01:4f8::1")
	return map[string][]byte{
		"empty": {}, "short": make([]byte, 13), "header alone": frame(etherIPv4, nil), "unknown type": frame(0x88cc, syn),
		"other sender": spoofedMAC, "spoofed": frame(etherIPv4, synFrom(other, public, 5000, 81)),
		"to itself": frame(etherIPv4, synFrom(guest4, guest4, 5000, 81)),
		"loopback":  frame(etherIPv4, synFrom(guest4, netip.MustParseAddr("127.0.0.1"), 5000, 81)),
		"multicast": frame(etherIPv4, synFrom(guest4, netip.MustParseAddr("224.0.0.1"), 5000, 81)),
		"broadcast": frame(etherIPv4, synFrom(guest4, netip.MustParseAddr("255.255.255.255"), 5000, 81)),
		"fragment":  frame(etherIPv4, edit(syn, 6, 0x20)), "last fragment": frame(etherIPv4, edit(syn, 7, 1)),
		"options": frame(etherIPv4, edit(syn, 0, 0x46)), "longer than it is": frame(etherIPv4, edit(syn, 2, 1)),
		"shorter than its header": frame(etherIPv4, edit(syn, 2, 0, 19)), "half a TCP header": frame(etherIPv4, edit(syn, 2, 0, 30)),
		"TCP header too long": frame(etherIPv4, edit(syn, 32, 0xf0)), "checksum": frame(etherIPv4, append(bytes.Clone(syn[:10]), append([]byte{1, 1}, syn[12:]...)...)),
		"other protocol": frame(etherIPv4, edit(syn, 9, 47)), "ping": frame(etherIPv4, ipFrom(guest4, gateway4, protoICMP, []byte{8, 0, 0, 0, 0, 0, 0, 0})),
		"short UDP":         frame(etherIPv4, ipFrom(guest4, public, protoUDP, make([]byte, 8))),
		"ARP for others":    frame(etherARP, arp(public)),
		"short ARP":         frame(etherARP, arp(gateway4)[:20]),
		"IPv6 spoofed":      frame(etherIPv6, synFrom(v6, v6, 5000, 81)),
		"IPv6 mapped":       frame(etherIPv6, ipFrame(netip.MustParseAddr("::ffff:192.0.0.2"), netip.MustParseAddr("::ffff:8.8.8.8"), protoUDP, make([]byte, 8))[etherHeader:]),
		"IPv6 extension":    frame(etherIPv6, edit(synFrom(guest6, v6, 5000, 81), 6, 0)),
		"IPv6 short":        frame(etherIPv6, synFrom(guest6, v6, 5000, 81)[:50]),
		"foreign neighbour": frame(etherIPv6, ipFrom(guest6, gateway6, protoICMPv6, append([]byte{135, 0, 0, 0, 0, 0, 0, 0}, v6.AsSlice()...))),
	}
}

// What is not as it should be gets no answer, leaves no trace, and disturbs
// nobody.
func TestBadFrames(t *testing.T) {
	n, conn := linked(t, Config{ipv6: new(true)})
	for name, f := range badFrames() {
		t.Run(name, func(t *testing.T) {
			go func() {
				_ = writeRaw(conn, f)
				_ = writeFrame(conn, etherARP, arp(gateway4)) // this is answered
			}()
			got, err := readFrame(conn)
			if err != nil || binary.BigEndian.Uint16(got[12:]) != etherARP {
				t.Errorf("answer %x: %v", got, err)
			}
		})
	}
	if u := n.Use(); len(u.Refusals) != 0 || len(u.Hosts) != 0 {
		t.Errorf("use is %+v", u)
	}
}

// A frame that no QEMU sends ends the link, and all that waits for it.
func TestHugeFrame(t *testing.T) {
	n, conn := linked(t, Config{})
	if _, err := conn.Write([]byte{0xff, 0xff, 0xff, 0xff}); err != nil {
		t.Fatal(err)
	}
	<-n.ctx.Done()
	if err := n.Close(); err != nil {
		t.Error(err)
	}
}

func FuzzFrame(f *testing.F) {
	for _, b := range badFrames() {
		f.Add(b)
	}
	ether := func(etherType uint16, data []byte) []byte {
		return append(append(append(gatewayMAC[:], guestMAC[:]...), byte(etherType>>8), byte(etherType)), data...)
	}
	for _, b := range [][]byte{synFrom(guest4, public, 5000, 81), synFrom(guest4, gateway4, 5000, 80), udpFrom(guest4, public, 1, 2, []byte("x"))} {
		f.Add(ether(etherIPv4, b))
	}
	f.Add(ether(etherIPv6, synFrom(guest6, gateway6, 5000, 80)))
	f.Add(ether(etherARP, arp(gateway4)))
	ours, theirs := net.Pipe()
	go discard(theirs)
	n, err := New(Config{ipv6: new(true), lookup: names(nil)}, ours)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() {
		theirs.Close()
		if err := n.Close(); err != nil {
			f.Error(err)
		}
	})
	f.Fuzz(func(t *testing.T, frame []byte) {
		before := bytes.Clone(frame)
		n.receive(frame)
		if !bytes.Equal(before, frame) {
			t.Error("the frame was changed")
		}
		if u := n.Use(); len(u.Hosts) > 0 || len(u.Refusals) > maxRefusals {
			t.Errorf("use is %+v", u)
		}
	})
}
