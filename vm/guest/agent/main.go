// Agent is what a guest runs, without the rest of nbd: the init of guests of
// another architecture than the server's (package guest). It is built by
// contrib/agents and goes into nbd by vm/agent.go.
package main

import (
	"fmt"
	"os"

	"nbd/vm/guest"
)

func main() {
	guest.Enter()
	fmt.Fprintln(os.Stderr, "nbd agent: this program is the init of a guest, and this is none")
	os.Exit(1)
}
