package server

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	gossh "golang.org/x/crypto/ssh"

	"nbd/nixproto"
	"nbd/store"
)

// BenchmarkIdleConnections measures what a connection that only waits costs the
// server: B/conn, stacks included, without a session and with one of the worker
// protocol. The clients are another process.
func BenchmarkIdleConnections(b *testing.B) {
	for _, command := range []string{"", "nix-daemon --stdio"} {
		b.Run("exec="+command, func(b *testing.B) {
			for range b.N {
				b.ReportMetric(idleCost(b, 1000, command), "B/conn")
			}
		})
	}
}

func idleCost(b *testing.B, connections int, command string) float64 {
	ts := newTestServer(b, func(c *Config) { c.MaxUnauthenticated = 4 * connections })
	before := memoryInUse()
	clients := exec.CommandContext(b.Context(), os.Args[0], "-test.run=^TestIdleClients$")
	clients.Env = append(os.Environ(), idleVariable+"="+strings.Join([]string{ts.addr, keyFile(b, ts), fmt.Sprint(connections), command}, ","))
	stdin, err := clients.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	stdout, err := clients.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := clients.Start(); err != nil {
		b.Fatal(err)
	}
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil || line != "ready\n" {
		b.Fatalf("clients say %q, %v", line, err)
	}
	cost := float64(memoryInUse()-before) / float64(connections)
	if err := errors.Join(stdin.Close(), clients.Wait()); err != nil {
		b.Fatal(err)
	}
	return cost
}

// keyFile writes a new key of the test account to a file.
func keyFile(tb testing.TB, ts *testServer) string {
	tb.Helper()
	dir := tb.TempDir()
	key, err := LoadHostKey(dir) // a key file like any other
	if err != nil {
		tb.Fatal(err)
	}
	if _, err := ts.store.AddKey(tb.Context(), ts.account.ID, store.Key{Wire: key.PublicKey().Marshal()}); err != nil {
		tb.Fatal(err)
	}
	return filepath.Join(dir, HostKeyFile)
}

func memoryInUse() uint64 {
	runtime.GC()
	runtime.GC() // what pools held over the first
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapInuse + m.StackInuse
}

// idleVariable holds address, key file, number of connections and command for
// the process of the clients.
const idleVariable = "NBD_TEST_IDLE"

// TestIdleClients is the process of the clients, and no test without
// idleVariable.
func TestIdleClients(t *testing.T) {
	args := strings.Split(os.Getenv(idleVariable), ",")
	if len(args) != 4 {
		return
	}
	text, err := os.ReadFile(args[1])
	if err != nil {
		t.Fatal(err)
	}
	key, err := gossh.ParsePrivateKey(text)
	if err != nil {
		t.Fatal(err)
	}
	cfg := &gossh.ClientConfig{Auth: []gossh.AuthMethod{gossh.PublicKeys(key)}, HostKeyCallback: gossh.InsecureIgnoreHostKey()}
	var n int
	if _, err := fmt.Sscan(args[2], &n); err != nil {
		t.Fatal(err)
	}
	for range n {
		c, err := gossh.Dial("tcp", args[0], cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if args[3] != "" {
			idleSession(t, c, args[3])
		}
	}
	fmt.Println("ready")
	_, _ = io.Copy(io.Discard, os.Stdin) // ends when all is measured
}

// idleSession opens a session of the worker protocol and leaves it alone.
func idleSession(t *testing.T, c *gossh.Client, command string) {
	t.Helper()
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	in, err := s.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := s.StdoutPipe()
	if err == nil {
		err = s.Start(command)
	}
	if err == nil {
		_, err = nixproto.NewClient(struct {
			io.Reader
			io.Writer
		}{out, in}, nixproto.Hello{Version: nixproto.MaxWorker}, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
}
