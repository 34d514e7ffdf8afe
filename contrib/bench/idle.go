package main

import (
	"fmt"
	"os"

	"golang.org/x/crypto/ssh"
)

// dialIdle opens n connections that are authenticated and do nothing.
func dialIdle(m *machine, n int) ([]*ssh.Client, error) {
	text, err := os.ReadFile(m.dir + "/key")
	if err != nil {
		return nil, err
	}
	key, err := ssh.ParsePrivateKey(text)
	if err != nil {
		return nil, err
	}
	host, err := os.ReadFile(m.state + "/ssh_host_ed25519_key.pub")
	if err != nil {
		return nil, err
	}
	pub, _, _, _, err := ssh.ParseAuthorizedKey(host)
	if err != nil {
		return nil, err
	}
	config := &ssh.ClientConfig{User: "bench", Auth: []ssh.AuthMethod{ssh.PublicKeys(key)}, HostKeyCallback: ssh.FixedHostKey(pub)}
	var conns []*ssh.Client
	for i := range n {
		c, err := ssh.Dial("tcp", "127.0.0.1:"+m.port, config)
		if err != nil {
			return conns, fmt.Errorf("connection %d: %w", i, err)
		}
		conns = append(conns, c)
	}
	return conns, nil
}
