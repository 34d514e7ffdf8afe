package vm

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

const qmpGreeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"]}}` + "\r\n"

// fakeQEMU answers commands on the other end of a socket: answer returns the
// lines for each. It returns QEMU's client, once greeted.
func fakeQEMU(t *testing.T, answer func(command string) string) (*qmp, error) {
	t.Helper()
	ours, theirs, err := socketPairs(1)
	if err != nil {
		t.Fatal(err)
	}
	server, err := net.FileConn(theirs[0])
	if err != nil {
		t.Fatal(err)
	}
	closeAll(theirs)
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer server.Close()
		greeting := answer("")
		if greeting == "" {
			return
		}
		io.WriteString(server, greeting)
		lines := bufio.NewScanner(server)
		for lines.Scan() {
			var c struct{ Execute string }
			if err := json.Unmarshal(lines.Bytes(), &c); err != nil {
				t.Errorf("command %q: %v", lines.Text(), err)
				return
			}
			a := answer(c.Execute)
			if a == "" {
				return
			}
			if _, err := io.WriteString(server, a); err != nil {
				return
			}
		}
	}()
	ctx, stop := context.WithTimeout(t.Context(), 10*time.Second)
	defer stop()
	q, err := newQMP(ctx, ours[0].(*net.UnixConn))
	t.Cleanup(func() {
		if q != nil {
			q.close()
		}
		<-done
	})
	return q, err
}

// polite answers every command with an empty return and what extra says.
func polite(extra map[string]string) func(string) string {
	return func(command string) string {
		if a, ok := extra[command]; ok {
			return a
		}
		if command == "" {
			return qmpGreeting
		}
		return `{"return": {}}` + "\r\n"
	}
}

func TestQMPMigrate(t *testing.T) {
	const event = `{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "MIGRATION", "data": {"status": "%"}}` + "\r\n"
	for _, tt := range []struct {
		name  string
		extra map[string]string
		want  string
	}{
		{"completed", map[string]string{"migrate": `{"return": {}}` + "\n" +
			strings.ReplaceAll(event, "%", "active") + `{"event":"STOP"}` + "\n" + strings.ReplaceAll(event, "%", "completed")}, ""},
		{"failed", map[string]string{"migrate": `{"return": {}}` + "\n" + strings.ReplaceAll(event, "%", "failed")}, "failed"},
		{"refused", map[string]string{"migrate-set-capabilities": `{"error": {"class": "GenericError", "desc": "no such capability"}}` + "\n"}, "no such capability"},
		{"dies", map[string]string{"migrate": ""}, errQMPClosed.Error()},
	} {
		t.Run(tt.name, func(t *testing.T) {
			q, err := fakeQEMU(t, polite(tt.extra))
			if err != nil {
				t.Fatal(err)
			}
			state, err := memfd("state", 0)
			if err != nil {
				t.Fatal(err)
			}
			defer state.Close()
			err = q.migrate(t.Context(), "migrate", state)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func TestQMPBadServers(t *testing.T) {
	for _, tt := range []struct{ name, greeting, want string }{
		{"no JSON", "hello\n", "read QMP message"},
		{"no greeting", `{"return": {}}` + "\n", "something else came"},
		{"closes", "", errQMPClosed.Error()},
		{"endless line", strings.Repeat("x", maxQMPLine+1), "buffer full"},
		{"two replies", qmpGreeting + `{"return": {}}` + "\n" + `{"return": {}}` + "\n", "reply without a command"},
		{"flood", qmpGreeting + strings.Repeat(`{"event": "RTC_CHANGE"}`+"\n", qmpEvents+1), "faster than they are read"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			q, err := fakeQEMU(t, func(c string) string {
				if c == "" {
					return tt.greeting
				}
				return ""
			})
			if err == nil {
				<-q.done
				err = q.err
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func TestQMPCommandEndsWithContext(t *testing.T) {
	block := make(chan struct{})
	defer close(block)
	q, err := fakeQEMU(t, func(c string) string {
		if c == "stop" {
			<-block
			return ""
		}
		return polite(nil)(c)
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := q.do(ctx, "stop", nil, nil, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	block <- struct{}{}
}

// A descriptor travels with the bytes of its command.
func TestQMPSendsDescriptor(t *testing.T) {
	ours, theirs, err := socketPairs(1)
	if err != nil {
		t.Fatal(err)
	}
	defer closeAll(theirs)
	server, err := net.FileConn(theirs[0])
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	io.WriteString(server, qmpGreeting+`{"return": {}}`+"\n"+"")
	q, err := newQMP(t.Context(), ours[0].(*net.UnixConn))
	if err != nil {
		t.Fatal(err)
	}
	defer q.close()
	sent, err := memfd("sent", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer sent.Close()
	sent.WriteString("it is me")
	go io.WriteString(server, `{"return": {"fd": 4}}`+"\n")
	var result struct{ FD int }
	if err := q.do(t.Context(), "getfd", map[string]any{"fdname": "st"}, sent, &result); err != nil || result.FD != 4 {
		t.Fatalf("getfd: %v, %v", result, err)
	}
	server.(*net.UnixConn).ReadMsgUnix(make([]byte, 26), nil) // qmp_capabilities
	b, oob := make([]byte, 4096), make([]byte, 64)
	var n, oobn int
	for oobn == 0 {
		if n, oobn, _, _, err = server.(*net.UnixConn).ReadMsgUnix(b, oob); err != nil {
			t.Fatal(err)
		}
	}
	if !strings.Contains(string(b[:n]), `"getfd"`) {
		t.Errorf("the descriptor came with %q", b[:n])
	}
	msgs, err := syscall.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		t.Fatal(err)
	}
	fds, err := syscall.ParseUnixRights(&msgs[0])
	if err != nil {
		t.Fatal(err)
	}
	got := os.NewFile(uintptr(fds[0]), "got")
	defer got.Close()
	text := make([]byte, 8)
	if _, err := got.ReadAt(text, 0); err != nil || string(text) != "it is me" {
		t.Errorf("%q, %v", text, err)
	}
}

func FuzzDecodeQMP(f *testing.F) {
	f.Add([]byte(qmpGreeting))
	f.Add([]byte(`{"return": {}}`))
	f.Add([]byte(`{"error": {"class": "GenericError", "desc": "x"}}`))
	f.Add([]byte(`{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "BLOCK_IO_ERROR", "data": {"device": "", "nospace": true, "node-name": "scr", "reason": "No space left on device", "operation": "write", "action": "stop"}}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		m, err := decodeQMP(line)
		if err != nil {
			return
		}
		e, err := m.event()
		if err == nil && e.Name != "" {
			event(e) // any event is judged without harm
		}
	})
}
