package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/gliderlabs/ssh"
	gossh "golang.org/x/crypto/ssh"
)

// What a small question costs is for the most part what the SSH library costs.
// So that one can see how much of it is nbd's, a server is measured that uses
// the same libraries and ciphers and only echoes: the floor under all figures
// of small paths.

// bareServer is the argument that makes this program such a server.
const bareServer = "serve-bare"

// bareMessage is about as long as the answer of what is known of a path, or as
// a small path.
const bareMessage = 1500

// serveBare serves connections of anybody: each session echoes messages.
func serveBare(addr, keyFile string) error {
	text, err := os.ReadFile(keyFile)
	if err != nil {
		return err
	}
	key, err := gossh.ParsePrivateKey(text)
	if err != nil {
		return err
	}
	s := &ssh.Server{
		HostSigners:      []ssh.Signer{key},
		PublicKeyHandler: func(ssh.Context, ssh.PublicKey) bool { return true },
		ServerConfigCallback: func(ssh.Context) *gossh.ServerConfig {
			return &gossh.ServerConfig{Config: gossh.Config{Ciphers: []string{gossh.CipherAES128GCM, gossh.CipherAES256GCM}}}
		},
		ChannelHandlers: map[string]ssh.ChannelHandler{
			"session": func(_ *ssh.Server, _ *gossh.ServerConn, nc gossh.NewChannel, _ ssh.Context) { echo(nc) },
		},
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	fmt.Println("echoes")
	return s.Serve(l)
}

// echo answers each byte of a session with a message.
func echo(nc gossh.NewChannel) {
	ch, reqs, err := nc.Accept()
	if err != nil {
		return
	}
	defer ch.Close()
	go func() {
		for r := range reqs {
			_ = r.Reply(true, nil) // its end is seen below
		}
	}()
	question, answer := make([]byte, bareMessage), make([]byte, bareMessage)
	for {
		if _, err := ch.Read(question); err != nil {
			_, _ = ch.SendRequest("exit-status", false, make([]byte, 4)) // the client may be gone
			return
		}
		if _, err := ch.Write(answer); err != nil {
			return
		}
	}
}

// bareRoundTrips measures two round trips for each small path, with the stock
// ssh program as the client.
func (b *bench) bareRoundTrips(*machine) error {
	m := &machine{name: "bare", dir: filepath.Join(b.dir, "bare")}
	if err := m.prepare(); err != nil {
		return err
	}
	if err := m.writeSSH(m.dir + "/key.pub"); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	m.start(exec.Command(self, bareServer, "127.0.0.1:"+m.port, m.dir+"/key"))
	defer m.stop()
	if err := m.await("echoes"); err != nil {
		return err
	}
	n := 2 * b.small
	trips := scenario{prepare: func(*bench, *machine, int) (func() error, error) {
		return func() error { return m.ask(n) }, nil
	}}
	var all []figure
	for round := range b.rounds {
		f, err := b.measure(trips, m, round)
		if err != nil {
			return err
		}
		all = append(all, f)
	}
	f := median(all)
	fmt.Printf("floor: %d round trips of a server that only echoes: %.2f s, CPU %.2f s (%.0f µs each)\n",
		n, f.wall.Seconds(), f.cpu.Seconds(), float64(f.cpu.Microseconds())/float64(n))
	return nil
}

// ask makes n round trips.
func (m *machine) ask(n int) error {
	cmd := exec.Command("ssh", "-F", m.dir+"/ssh", "bench", "echo")
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	question, answer := make([]byte, 100), make([]byte, bareMessage)
	for range n {
		if _, err := in.Write(question); err != nil {
			return err
		}
		if _, err := io.ReadFull(out, answer); err != nil {
			return err
		}
	}
	in.Close()
	return cmd.Wait()
}
