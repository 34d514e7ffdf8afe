package link

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// messages holds one of each type, with every field set.
var messages = []Message{
	&Hello{Version: Version, Kernel: "6.1.0-56-cloud-amd64", Features: []string{"kvm"}},
	&Wake{Entropy: bytes.Repeat([]byte{0xa5}, MinEntropy), Time: 1700000000123456789, CPUs: 3},
	&Awake{},
	&Beat{},
	&Beat{Usage: &Usage{CPUUser: time.Second, CPUSystem: 1, PeakMemory: 1 << 33, PeakScratch: 4096}},
	&Started{},
	&BuildOrder{
		DrvPath: "/nix/store/s66mzxpvicwk07gjbjfw9izjfa797vsw-hello.drv",
		System:  "i686-linux",
		Builder: "/bin/sh",
		Args:    [][]byte{[]byte("sh"), []byte("-c"), {0xff, 0xfe, '<'}},
		Env:     [][]byte{[]byte("PATH=/path-not-set"), []byte("latin=\xe4")},
		Files:   []File{{Name: ".attrs.json", Data: []byte("{}")}},
		Inputs:  []string{"26xbg1ndr7hbcncrlf9nhx5is2b25d13-busybox"},
		Outputs: []Output{{Name: "out", Path: "/nix/store/8b5pmbnyr2pqd7whh57s7pk4yj4g0m4c-hello"}},
		Network: &Network{MAC: "52:54:00:00:00:01", MTU: 1500, Addresses: []string{"192.0.0.2/29"}, Gateways: []string{"192.0.0.1"},
			Nameserver: "192.0.0.1", Certificates: []byte("PEM")},
		FixedOutput: true, KVM: true, CPUs: 2, MemoryMiB: 2048, MaxProcesses: 1000, Unconfined: true,
	},
	&Outputs{Outputs: []OutputInfo{{Name: "out", Size: 1 << 40}}},
	&Result{
		Kind: Signaled, ExitStatus: 1, Signal: 9, Message: "a \"message\"\n", LogBytes: 77,
		Usage:    Usage{CPUUser: time.Second, CPUSystem: time.Millisecond, PeakMemory: 1 << 33, PeakScratch: 4096},
		OOMKills: 1, ProcessLimit: 2, DiskFull: true, IOErrors: true,
	},
}

// What the other tests send is whole, also when a message gets a new field.
func TestMessagesAreWhole(t *testing.T) {
	var check func(name string, v reflect.Value)
	check = func(name string, v reflect.Value) {
		if v.IsZero() {
			t.Errorf("%s is not set", name)
			return
		}
		if v.Kind() == reflect.Pointer {
			v = v.Elem()
		}
		if v.Kind() != reflect.Struct {
			return
		}
		for i := range v.NumField() {
			check(name+"."+v.Type().Field(i).Name, v.Field(i))
		}
	}
	for _, m := range messages {
		if v := reflect.ValueOf(m).Elem(); !v.IsZero() { // some are sent empty
			check(m.messageType(), v)
		}
	}
}

func TestWarm(t *testing.T) {
	if err := Warm(); err != nil {
		t.Fatal(err)
	}
}

func TestRoundTrip(t *testing.T) {
	for _, m := range messages {
		t.Run(m.messageType(), func(t *testing.T) {
			frame, err := encode(m)
			if err != nil {
				t.Fatal(err)
			}
			c := Guest(struct {
				io.Reader
				io.Writer
			}{iotest.OneByteReader(bytes.NewReader(frame)), nil})
			got, err := c.Receive()
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(m, got); diff != "" {
				t.Error(diff)
			}
			if _, err := c.Receive(); err != io.EOF {
				t.Errorf("at the end: %v, want EOF", err)
			}
		})
	}
}

func TestConnIsSafeForConcurrentSenders(t *testing.T) {
	host, guest := net.Pipe()
	defer host.Close()
	defer guest.Close()
	const each = 50
	g := Guest(guest)
	for range 4 {
		go func() {
			for range each {
				if err := g.Send(&Beat{}); err != nil {
					t.Error(err)
					return
				}
			}
		}()
	}
	h := Host(host)
	for i := range 4 * each {
		if m, err := h.Receive(); err != nil {
			t.Fatalf("message %d: %v", i, err)
		} else if _, ok := m.(*Beat); !ok {
			t.Fatalf("message %d is %T", i, m)
		}
	}
}

func TestLimits(t *testing.T) {
	big := &BuildOrder{Files: []File{{Name: "f", Data: make([]byte, 8<<20)}}}
	var out bytes.Buffer
	if err := Guest(&out).Send(big); !errors.Is(err, ErrTooLong) {
		t.Errorf("guest sends 8 MiB: %v, want ErrTooLong", err)
	}
	if out.Len() != 0 {
		t.Errorf("%d bytes were written", out.Len())
	}
	if err := Host(&out).Send(big); err != nil {
		t.Fatal(err)
	}
	if _, err := Host(bytes.NewBuffer(out.Bytes())).Receive(); !errors.Is(err, ErrTooLong) {
		t.Errorf("host receives 8 MiB: %v, want ErrTooLong", err)
	}
	if _, err := Guest(&out).Receive(); err != nil {
		t.Errorf("guest receives 8 MiB: %v", err)
	}
}

func TestBadFrames(t *testing.T) {
	for _, tt := range []struct{ name, frame, want string }{
		{"no object", `7`, "decode frame"},
		{"unknown type", `{"type":"reboot","body":{}}`, "unknown type"},
		{"unknown field", `{"type":"beat","body":{"x":1}}`, "unknown field"},
		{"unknown member", `{"type":"beat","body":{},"more":1}`, "unknown field"},
		{"no body", `{"type":"beat"}`, "decode beat"},
		{"two values", `{"type":"beat","body":{}}{}`, "something follows"},
		{"wrong type", `{"type":"wake","body":{"Time":"now"}}`, "decode wake"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := decode([]byte(tt.frame)); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q in it", err, tt.want)
			}
		})
	}
	for _, n := range []int{1, 3, 4, 10} {
		frame, err := encode(&Beat{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Host(bytes.NewBuffer(frame[:n])).Receive(); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%d bytes: %v, want ErrUnexpectedEOF", n, err)
		}
	}
}

func FuzzReceive(f *testing.F) {
	for _, m := range messages {
		frame, err := encode(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(frame)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := Host(bytes.NewBuffer(b)).Receive()
		if err != nil {
			return
		}
		frame, err := encode(m)
		if err != nil {
			t.Fatalf("encode what was decoded: %v", err)
		}
		again, err := decode(frame[4:])
		if err != nil {
			t.Fatalf("decode what was encoded: %v", err)
		}
		if diff := cmp.Diff(m, again); diff != "" {
			t.Error(diff)
		}
		if n := binary.LittleEndian.Uint32(frame); int(n) != len(frame)-4 {
			t.Errorf("length %d of %d", n, len(frame)-4)
		}
	})
}
